"""The formulas for the memory of stored weights match the memory that the formats use for storage and decoding."""

import pytest
import torch
from torch import nn

from benchmarks.format_errors import errors_of
from library.memory.codecs.weight_format import load_format
from library.memory.frozen import freeze_layer
from library.memory.planner.weights import Matrix, StorageCost
from tests.unit.memory.planner.made_up import allocated_peak
from tests.weight_formats import CODECS


@pytest.mark.parametrize("shape", [(48, 128), (33, 64), (32, 16, 3, 3)])
@pytest.mark.parametrize("name", CODECS)
def test_a_format_stores_the_bytes_of_its_formula(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(95)
    weight = torch.randn(shape).bfloat16()
    stored = sum(part.numel() * part.element_size() for part in CODECS[name].encode(weight).values())
    assert StorageCost.of(name).num_bytes(Matrix.of(weight)) == stored


@pytest.mark.parametrize("name", CODECS)
def test_decoding_takes_the_declared_number_of_copies(name: str) -> None:
    torch.manual_seed(96)
    layer = nn.Linear(1024, 2048, bias=False).bfloat16().requires_grad_(False)
    matrix = Matrix.of(layer.weight)
    freeze_layer(CODECS[name], layer)
    x = torch.randn(1, 1024).bfloat16().requires_grad_()
    layer(x)  # one-time allocations such as tables
    taken = allocated_peak(lambda: layer(x).sum().backward(), multiplies_bf16=True) / matrix.plain_bytes
    # CPU kernels use workspaces of up to a fifth of this small weight, more with more threads.
    assert taken == pytest.approx(StorageCost.of(name).num_copies, abs=0.25)


@pytest.mark.slow
def test_the_declared_error_of_a_format_matches_a_product_with_outliers() -> None:
    """benchmarks/format_errors.py measures the same product with a larger weight."""
    measured = {name: errors_of(load_format(name).codec, 2048)[2] for name in CODECS}
    for name, value in measured.items():
        declared = load_format(name).error
        assert declared is not None and value == pytest.approx(declared, rel=0.15), name
