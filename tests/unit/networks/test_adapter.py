"""One adapted layer: its outputs, its gradients, and the parts of the layer that stay unchanged."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.dropout import Dropout
from networks.core.changes.low_rank import LowRank
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of
from tests.unit.networks.toy import randomize

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "linear on rows": (lambda: nn.Linear(7, 5, bias=False), (4, 7)),
    "linear on pixels": (lambda: nn.Linear(7, 5), (2, 3, 3, 7)),
    "1x1": (lambda: nn.Conv2d(7, 5, 1), (2, 7, 4, 4)),
    "1x1 stride 2": (lambda: nn.Conv2d(7, 5, 1, stride=2), (2, 7, 4, 4)),
    "3x3": (lambda: nn.Conv2d(7, 5, 3, padding=1), (2, 7, 5, 5)),
    "3x3 stride 2 dilation 2": (lambda: nn.Conv2d(7, 5, 3, stride=2, padding=(2, 1), dilation=2), (2, 7, 9, 8)),
}

NO_DROPOUT = Dropout()


def adapted(layer: nn.Module, seed: int, rank: int = 3, alpha: float = 2.0, drops: Dropout = NO_DROPOUT) -> Adapter:
    adapter = adapter_on(layer, LowRank(layer, rank), alpha, drops=drops, multiplier=0.7)
    randomize(module_of(adapter), seed)
    return adapter


def frozen(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make().requires_grad_(False)


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_equals_that_of_the_layer_with_the_merged_weight(name: str) -> None:
    make, shape = LAYERS[name]
    layer = frozen(make, 11).double()
    merged = copy.deepcopy(layer)
    adapter = double(adapted(layer, 12))
    merged.weight.data = adapter.merged()["weight"]
    x = torch.randn(shape, dtype=torch.float64)
    alone = layer(x)
    adapter.install()
    for form in (torch.contiguous_format, *[torch.channels_last] * (x.dim() == 4)):
        torch.testing.assert_close(layer(x.contiguous(memory_format=form)), merged(x), **FLOAT64)
    assert (layer(x) - alone).abs().max() > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_factor_gradients_follow_from_the_gradient_of_the_merged_weight(name: str) -> None:
    make, shape = LAYERS[name]
    layer = frozen(make, 21).double()
    adapter = double(adapted(layer, 22, rank=3, alpha=2.0))
    up, down = adapter.change.get_parameter("lora_up.weight"), adapter.change.get_parameter("lora_down.weight")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    merged = copy.deepcopy(layer)
    change = 0.7 * (2.0 / 3) * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    merged.weight = nn.Parameter((layer.weight + change).detach())
    expected_y = merged(x)
    seen_by = torch.randn_like(expected_y)
    expected_x, grad_W = torch.autograd.grad((expected_y * seen_by).sum(), (x, merged.weight))
    grad_OI = grad_W.flatten(1) * 0.7 * 2.0 / 3

    adapter.install()
    got_x, got_up, got_down = torch.autograd.grad((layer(x) * seen_by).sum(), (x, up, down))
    torch.testing.assert_close(got_x, expected_x, **FLOAT64)
    torch.testing.assert_close(got_up.flatten(1), grad_OI @ down.flatten(1).t(), **FLOAT64)
    torch.testing.assert_close(got_down.flatten(1), up.flatten(1).t() @ grad_OI, **FLOAT64)


def test_a_fresh_adapter_changes_nothing_and_its_down_factor_is_kaiming_uniform() -> None:
    layer = frozen(lambda: nn.Linear(400, 5), 31)
    torch.manual_seed(32)
    adapter = adapter_on(layer, LowRank(layer, 50), 1.0)
    x = torch.randn(2, 400)
    alone = layer(x)
    adapter.install()
    assert torch.equal(layer(x), alone)
    down = adapter.change.get_parameter("lora_down.weight")
    assert 0.049 < down.abs().max() <= 0.05  # 1 / sqrt(400)
    assert down.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)


@pytest.mark.parametrize(("alpha", "scale"), [(2.0, 0.5), (0.0, 1.0), (4.0, 1.0)])
def test_scale_is_alpha_over_rank_and_alpha_0_means_the_rank(alpha: float, scale: float) -> None:
    adapter = adapted(frozen(lambda: nn.Linear(6, 6), 41), 42, rank=4, alpha=alpha)
    assert adapter.change.scale == scale
    assert adapter.change.alpha.dtype == torch.float32 and adapter.change.alpha.shape == ()
    assert float(adapter.change.alpha) == (alpha or 4)


def test_the_layer_keeps_its_keys_and_its_forward_is_restored_on_removal() -> None:
    layer = frozen(lambda: nn.Linear(6, 6), 51)
    keys, modules = list(layer.state_dict()), list(layer.modules())
    x = torch.randn(2, 6)
    alone = layer(x)
    adapter = adapted(layer, 52)
    adapter.install()
    assert not torch.allclose(layer(x), alone)
    assert list(layer.state_dict()) == keys and list(layer.modules()) == modules
    adapter.remove()
    assert torch.equal(layer(x), alone)
    assert "forward" not in vars(layer)


def test_two_adapters_on_one_layer_add_up_and_are_removed_one_by_one() -> None:
    layer = frozen(lambda: nn.Linear(6, 6), 61).double()
    first, second = double(adapted(layer, 62)), double(adapted(layer, 63))
    x = torch.randn(2, 6, dtype=torch.float64)
    alone = layer(x)
    first.install()
    with_first = layer(x)
    second.install()
    torch.testing.assert_close(
        layer(x) - with_first, nn.functional.linear(x, second.multiplier * second.change.weight()), **FLOAT64
    )
    with pytest.raises(ValueError, match="wrapped again"):
        first.remove()
    second.remove()
    assert torch.equal(layer(x), with_first)
    first.remove()
    assert torch.equal(layer(x), alone)


def test_multiplier_0_leaves_the_layers_output_unchanged() -> None:
    layer = frozen(lambda: nn.Linear(6, 6), 71)
    adapter = adapted(layer, 72)
    x = torch.randn(2, 6)
    alone = layer(x)
    adapter.install()
    adapter.multiplier = 0.0
    assert torch.equal(layer(x), alone)


def change_of(layer: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    """Return what the adapter adds to the layer's output."""
    alone = layer(x)
    adapter.install()
    change: Tensor = layer(x) - alone
    adapter.remove()
    return change


def test_module_dropout_drops_the_whole_change_at_its_rate() -> None:
    layer = frozen(lambda: nn.Linear(6, 6), 91)
    adapter, without = adapted(layer, 92, drops=Dropout(module=0.25)), adapted(layer, 92)
    x = torch.randn(1, 6)
    full = change_of(layer, without, x)
    torch.manual_seed(93)
    changes = [change_of(layer, adapter, x) for _ in range(400)]
    dropped = [bool((change == 0).all()) for change in changes]
    assert 0.19 < sum(dropped) / 400 < 0.31
    kept_change = changes[dropped.index(False)]
    torch.testing.assert_close(kept_change, full, **FLOAT32_SAME_MATH)


@pytest.mark.parametrize("name", ["linear", "linear on rows", "3x3"])
def test_rank_dropout_masks_ranks_per_sample_and_rescales_the_rest(name: str) -> None:
    make, shape = LAYERS[name]
    layer = frozen(make, 101).double()
    adapter = double(adapted(layer, 102, 4, 4.0, Dropout(rank=0.4)))
    x = torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(103)
    got = change_of(layer, adapter, x)
    torch.manual_seed(103)
    keep_BR = (torch.rand(shape[0], 4) > 0.4).double()
    expected = []
    for sample, keep_R in zip(x, keep_BR, strict=True):
        down, up = adapter.change.get_parameter("lora_down.weight"), adapter.change.get_parameter("lora_up.weight")
        weight = (up.flatten(1) * keep_R) @ down.flatten(1) * 0.7 / (1 - 0.4)
        plain = copy.deepcopy(layer)
        plain.weight.data, plain.bias = weight.view_as(layer.weight), None
        expected.append(plain(sample[None]))
    torch.testing.assert_close(got, torch.cat(expected), **FLOAT64)
    assert 0 < keep_BR.mean() < 1


def test_neuron_dropout_zeroes_single_values_and_scales_up_the_others() -> None:
    layer = frozen(lambda: nn.Linear(6, 6, bias=False), 111)
    adapter = adapted(layer, 112, rank=6, alpha=6.0, drops=Dropout(neuron=0.5))
    with torch.no_grad():
        adapter.change.get_parameter("lora_down.weight").copy_(torch.eye(6))
        adapter.change.get_parameter("lora_up.weight").copy_(torch.eye(6))
    adapter.multiplier = 1.0
    torch.manual_seed(113)
    change = change_of(layer, adapter, torch.ones(200, 6))
    values = change.round(decimals=4).unique().tolist()
    assert values == [0.0, 2.0]
    assert change.mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_float32_adapter_on_a_bf16_layer_returns_the_layers_dtype(name: str) -> None:
    make, shape = LAYERS[name]
    layer = frozen(make, 141).bfloat16()
    adapter = adapted(layer, 142)
    x = torch.randn(shape).bfloat16()
    change = change_of(layer, adapter, x)
    assert change.dtype == torch.bfloat16
    plain = copy.deepcopy(layer).float()
    plain.weight.data, plain.bias = adapter.multiplier * adapter.change.weight(), None
    torch.testing.assert_close(change.float(), plain(x.float()), rtol=0.02, atol=0.04)


def test_loading_weights_applies_the_alpha_of_the_file() -> None:
    adapter = adapted(frozen(lambda: nn.Linear(6, 6), 151), 152, rank=4, alpha=1.0)
    adapter.change.load_state_dict({**adapter.change.state_dict(), "alpha": torch.tensor(8)})
    assert adapter.change.scale == 2.0


def test_a_cast_to_bf16_leaves_the_strength_exact() -> None:
    adapter = adapted(frozen(lambda: nn.Linear(6, 6), 161), 162, rank=4, alpha=0.1)
    module_of(adapter).to(torch.bfloat16)
    assert adapter.change.scale == 0.1 / 4


def test_grouped_convolutions_are_refused() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="groups=2"):
        LowRank(layer, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_computes_with_all_digits_of_alpha(dtype: torch.dtype) -> None:
    """bfloat16 has no 0.3, and float32(0.3) / 5 is another float32 than 0.3 / 5."""
    layer = frozen(LAYERS["linear"][0], 91)
    first, second = (module_of(adapted(layer, 92, rank=5, alpha=0.3)).to(dtype) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert second.alpha_value == 0.3
    other = module_of(adapted(layer, 92, rank=5, alpha=0.4)).to(dtype)
    other.load_state_dict(first.state_dict())
    assert other.alpha_value == float(torch.tensor(0.3, dtype=torch.float32))


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_a_layer_that_the_model_calls_by_keyword_is_adapted(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = frozen(make, 0), torch.randn(shape)
    adapter = adapted(layer, 1)
    adapter.install()
    assert torch.equal(layer(input=x), layer(x))
    adapter.remove()
    assert not torch.equal(layer(x), adapter.change.forward(x, layer.forward, 0.7))
