"""Layers whose two halves are swapped in diffusers."""

import pytest
import torch

from library.checkpoints.adapter_names import BaseNames, FileNaming, ModuleNames
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE, DOWN, UP
from networks.core.files.adapter_file import AdapterFile, parse_adapter
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import rename

PAIR = ModuleNames("lora_unet_mod", "diffusion_model.mod", "transformer.norm.linear", swaps_pair=True)
NAMES = BaseNames("toy", (PAIR,))


def file(num_outputs: int) -> AdapterFile:
    g = torch.Generator().manual_seed(3)
    up, down = torch.randn(num_outputs, 2, generator=g), torch.randn(2, 5, generator=g)
    tensors = {UP: up, DOWN: down, ALPHA: torch.tensor(2.0)}
    module = ModuleWeights(PAIR.kohya, tensors, {leaf: f"{PAIR.kohya}.{leaf}" for leaf in tensors})
    return AdapterFile("a.safetensors", {PAIR.kohya: module}, {}, {})


def up_of(file: AdapterFile) -> torch.Tensor:
    (module,) = file.modules.values()
    return module.tensors[UP]


@pytest.mark.parametrize("naming", ["kohya", "generic"])
def test_only_diffusers_swaps_the_halves(naming: FileNaming) -> None:
    before = file(10)
    assert torch.equal(up_of(rename(before, NAMES, naming).file), up_of(before))
    converted = rename(before, NAMES, "diffusers").file
    assert torch.equal(up_of(converted), torch.cat([up_of(before)[5:], up_of(before)[:5]]))
    assert torch.equal(up_of(rename(converted, NAMES, "diffusers").file), up_of(converted)), "they are swapped already"
    assert torch.equal(up_of(rename(converted, NAMES, naming).file), up_of(before))


def test_magnitudes_of_the_rows_move_with_them() -> None:
    name = PAIR.diffusers
    up, down, sizes = torch.randn(10, 2), torch.randn(2, 5), torch.arange(10.0)
    theirs = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_magnitude_vector": sizes}
    (converted,) = rename(parse_adapter(theirs, {}, "a.safetensors"), NAMES, "kohya").file.modules.values()
    assert torch.equal(converted.tensors[UP], torch.cat([up[5:], up[:5]]))
    assert converted.tensors[DORA_SCALE].flatten().tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_a_layer_of_more_parts_keeps_its_order() -> None:
    before = file(30)
    assert torch.equal(up_of(rename(before, NAMES, "diffusers").file), up_of(before))


KINDS = {
    "LoKr": {"lokr_w1": (2, 5), "lokr_w2": (5, 1)},
    "factorised LoKr": {"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 5), "lokr_w2_a": (5, 3), "lokr_w2_b": (3, 1)},
    "LoKr with one row": {"lokr_w1": (1, 5), "lokr_w2_a": (10, 3), "lokr_w2_b": (3, 1)},
    "LoHa": {"hada_w1_a": (10, 3), "hada_w1_b": (3, 5), "hada_w2_a": (10, 3), "hada_w2_b": (3, 5)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_kinds_move_too(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    theirs = {
        f"{PAIR.diffusers}.{leaf}": torch.randn(shape, generator=generator) for leaf, shape in KINDS[kind].items()
    }
    file = parse_adapter(theirs, {}, "a.safetensors")
    (before,), (after,) = file.modules.values(), rename(file, NAMES, "kohya").file.modules.values()
    weight = before.weight()
    torch.testing.assert_close(after.weight(), torch.cat([weight[5:], weight[:5]]))


def test_rows_that_cannot_be_swapped_are_named() -> None:
    """With an outer matrix of 5 rows the halves are not rows of either matrix."""
    theirs = {f"{PAIR.diffusers}.lokr_w1": torch.randn(5, 5), f"{PAIR.diffusers}.lokr_w2": torch.randn(2, 1)}
    with pytest.raises(ValueError, match=r"the halves of the rows of transformer\.norm\.linear have another order"):
        rename(parse_adapter(theirs, {}, "a.safetensors"), NAMES, "kohya")
