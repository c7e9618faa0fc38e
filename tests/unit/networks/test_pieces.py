"""Changes of row ranges of one layer compute what separate layers compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import Delta
from networks.core.changes.dora import Decompose, DoRA
from networks.core.changes.low_rank import LowRank
from networks.core.changes.qkv_pieces import InRows, LinearRows, changes_in, rows_of
from networks.core.kinds.loha import LoHa
from networks.core.kinds.lokr import make_fresh
from tests.tolerances import FLOAT64

PARTS = {"rows_0_1_of_4": (0, 6), "rows_2_4_of_4": (12, 24)}  # the second quarter is not changed
MAKES: dict[str, tuple[Callable[[Any], Delta], Callable[[Tensor], Decompose | None]]] = {
    "LoKr": (lambda layer: make_fresh(layer, 2, 2), lambda weight: None),
    "LoHa": (lambda layer: LoHa(layer, 2), lambda weight: None),
    "LoHa, wide": (lambda layer: LoHa(layer, 5), lambda weight: None),
    "DoRA": (lambda layer: LowRank(layer, 2), Decompose),
    "DoRA per output": (lambda layer: LowRank(layer, 2), lambda weight: Decompose(weight, is_per_output=True)),
}


def change_of(layer: nn.Linear, kind: str, seed: int) -> ScaledDelta:
    """Return a change with random weights, rank 2 and alpha 3, in float64."""
    make_delta, make_join = MAKES[kind]
    torch.manual_seed(seed)
    delta, join = make_delta(layer), make_join(layer.weight)
    change = (ScaledDelta(layer, delta, 3.0) if join is None else DoRA(layer, delta, 3.0, join)).double()
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.mul_(0.8).add_(torch.randn_like(parameter) * 0.3)
    return change


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", MAKES)
def test_output_gradients_and_merged_weight_match_separate_layers(kind: str, strength: float) -> None:
    torch.manual_seed(5301)
    layer = nn.Linear(16, 24).double().requires_grad_(False)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    changes = {name: change_of(LinearRows(layer, rows_of(name, 24)), kind, 5302 + i) for i, name in enumerate(PARTS)}
    combined = InRows(dict(reversed(changes.items())))  # files have pieces in any order
    y = combined(x, layer, strength)
    expected = layer(x).clone()
    merged = layer.weight.clone()
    twins = []
    for i, (first, stop) in enumerate(PARTS.values()):
        alone = nn.Linear(16, stop - first).double().requires_grad_(False)
        alone.weight.copy_(layer.weight[first:stop])
        alone.bias.copy_(layer.bias[first:stop])
        twins.append(change_of(alone, kind, 5302 + i))
        expected = torch.cat([expected[..., :first], twins[-1](x, alone, strength), expected[..., stop:]], -1)
        merged[first:stop] = twins[-1].merged(alone.weight, strength)
    torch.testing.assert_close(y, expected, **FLOAT64)
    assert (y - layer(x)).abs().max() > 0.1
    torch.testing.assert_close(combined.merged(layer.weight, strength), merged, **FLOAT64)
    seen_by = torch.randn_like(y)
    got = torch.autograd.grad((y * seen_by).sum(), (x, *(p for c in changes.values() for p in c.parameters())))
    expected_grads = torch.autograd.grad((expected * seen_by).sum(), (x, *(p for c in twins for p in c.parameters())))
    for actual, expected_grad in zip(got, expected_grads, strict=True):
        torch.testing.assert_close(actual, expected_grad, **FLOAT64)


def test_loraplus_names_and_norms_cover_all_pieces() -> None:
    torch.manual_seed(5311)
    layer = nn.Linear(16, 24).double().requires_grad_(False)
    changes = {name: change_of(LinearRows(layer, rows_of(name, 24)), "LoKr", 5312 + i) for i, name in enumerate(PARTS)}
    combined = InRows(changes)
    assert list(changes_in(combined)) == list(changes.values()) and list(changes_in(changes["rows_0_1_of_4"])) != []
    assert combined.fast_keys == {f"{name}.lokr_w1" for name in PARTS} <= dict(combined.named_parameters()).keys()
    change = combined.merged(layer.weight) - layer.weight
    torch.testing.assert_close(combined.norm(), change.norm(), **FLOAT64)
    combined.scale_(torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(combined.merged(layer.weight) - layer.weight, change * 0.25, **FLOAT64)
    assert not any(name.startswith("whole") for name, _ in combined.named_parameters())
