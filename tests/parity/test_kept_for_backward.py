"""Tensors saved for the backward pass are not views of larger tensors, which would be kept in full."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.test_counting import BatchShape, open_tiny, real_step
from tests.tiny.bases import BASES

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

SHARE = 0.03  # shifts, scales and gates are views of one vector; the last layer uses the image part of all tokens


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", BASES)
def test_no_saved_view_keeps_a_larger_tensor_alive(name: str, precision: str, tmp_path: Path) -> None:
    options, arch = open_tiny(name, tmp_path / "model", "--mixed_precision", precision)
    step = real_step(options, arch, BatchShape(2, 256, 192), recomputes=False)
    saved_tensors: dict[int, list[Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            saved_tensors.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    sizes = {key: parts[0].untyped_storage().nbytes() for key, parts in saved_tensors.items()}
    idle = sum(sizes[key] - bytes_of_union(parts) for key, parts in saved_tensors.items())
    assert idle < SHARE * sum(sizes.values())


def bytes_of_union(parts: list[Tensor]) -> int:
    """Return the bytes that tensors of one storage cover together."""
    size = parts[0].element_size()
    is_used = torch.zeros(parts[0].untyped_storage().nbytes() // size, dtype=torch.bool)
    places = torch.arange(len(is_used))
    for part in parts:
        is_used[places.as_strided(part.shape, part.stride(), part.storage_offset()).flatten()] = True
    return size * int(is_used.sum())
