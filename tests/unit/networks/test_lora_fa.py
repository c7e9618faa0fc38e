"""LoRA-FA: the down factor is never trained and never keeps its layer's input in memory."""

import logging
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from networks import lora, lora_fa
from networks.core.changes.change import Delta, get_weight
from networks.core.changes.low_rank import LowRank
from networks.core.kinds.lora_fa import frozen_down
from networks.core.targets.targets import adaptation_kind
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.one_layer import adapter_on, module_of
from tests.unit.networks.toy import randomize, toy_models

CONV = {"conv_dim": "3", "conv_alpha": "2"}


def outputs(models: tuple[nn.Module, nn.Module], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 7), (2, 6, 4, 4))
    return [model(torch.randn(shape, generator=generator)) for model, shape in zip(models, shapes, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_dropout": "0.2", "module_dropout": "0.2", "dropout": "0.2"},
        {"use_scalar": "True"},
        {"dora_wd": "True"},
        {"dora_wd": "True", "wd_on_output": "True"},
        {"train_norm": "True"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_training_changes_up_factors_and_no_down_factor(options: dict[str, str]) -> None:
    models = toy_models(1)
    network = lora_fa.create_network(1.0, 4, 2, None, *models, **CONV, **options)
    network.apply_to(*models)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, 1e-2)
    network.prepare_grad_etc(*models)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(8):
        sum(y.square().mean() for y in outputs(models, step)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    assert names == ["textencoder", "unet"]
    for key, tensor in network.state_dict().items():
        is_fixed = key.endswith(("lora_down.weight", "alpha"))
        assert torch.equal(tensor, before[key]) == is_fixed, key
        assert tensor.isfinite().all()
    frozen = [module for name, module in network.named_modules() if name.endswith("lora_down")]
    assert len(frozen) == 14
    assert all(get_weight(module).grad is None and not get_weight(module).requires_grad for module in frozen)


def test_only_up_factors_reach_the_optimizer_and_gradient_clipping() -> None:
    models = toy_models(2)
    network = lora_fa.create_network(1.0, 4, 2, None, *models, **CONV)
    network.apply_to(*models)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    network.prepare_grad_etc(*models)
    ups = {id(adapter.change.get_parameter("lora_up.weight")) for adapter in network.adapters.values()}
    assert {id(p) for p in network.get_trainable_params()} == ups
    assert {id(p) for group in groups for p in group["params"]} == ups
    assert {name.rpartition("lora_")[2] for name, _ in network.named_parameters()} == {"up.weight"}
    assert len(ups) == len(network.adapters) == 14


def test_down_starts_normal_with_a_deviation_set_by_its_sizes_and_up_at_zero() -> None:
    torch.manual_seed(3)
    linear = frozen_down(nn.Linear(600, 5), 200)
    conv = frozen_down(nn.Conv2d(72, 5, 3), 128)
    for delta, deviation in ((linear, (2 / 800) ** 0.5), (conv, 0.1)):
        children = dict(delta.named_children())
        down = get_weight(children["lora_down"])
        assert down.std().item() == pytest.approx(deviation, rel=0.02)
        assert down.mean().item() == pytest.approx(0, abs=deviation / 100)
        assert 0.675 < (down.abs() < deviation).float().mean() < 0.69  # as in a normal distribution: 0.683
        assert get_weight(children["lora_up"]).count_nonzero() == 0


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (2, 50, 64)),
    "1x1": (lambda: nn.Conv2d(64, 48, 1), (2, 64, 8, 8)),
    "3x3": (lambda: nn.Conv2d(64, 48, 3, padding=1), (2, 64, 8, 8)),
}


def saved_tensors(
    name: str, make_delta: Callable[[nn.Module, int], Delta] | None, autocast: bool = False
) -> dict[int, tuple[int, ...]]:
    """Return the non-weight tensors that autograd saves for one layer's backward pass, as address -> shape."""
    torch.manual_seed(4)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    adapter: nn.Module = nn.Identity()
    if make_delta is not None:
        kind = adaptation_kind(layer)
        assert kind is not None
        installed = adapter_on(layer, make_delta(layer, 4), 2.0)
        randomize(module_of(installed), 5)
        installed.install()
        adapter = module_of(installed)
    weights = {t.data_ptr() for module in (layer, adapter) for t in module.state_dict().values()}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)  # kept alive, so that no address is reused
        return tensor

    x = torch.randn(shape, requires_grad=True)
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().sum().backward()
    return {t.data_ptr(): tuple(t.shape) for t in tensors if t.data_ptr() not in weights}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_autograd_saves_the_hidden_state_and_not_the_input_of_a_linear_layer(autocast: bool) -> None:
    """Two samples of 50 tokens with 64 features: 6400 values, and 400 at rank 4. Autocast adds copies of weights."""
    copies = {64 * 48, 64 * 4, 48 * 4} if autocast else set()
    sizes = [
        {torch.Size(shape).numel() for shape in saved_tensors("linear", make, autocast).values()}
        for make in (LowRank, frozen_down)
    ]
    assert sizes[0] - copies == {6400, 400}
    assert sizes[1] - copies == {400}


@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_for_a_convolution_the_adapter_saves_only_the_hidden_state_on_top_of_the_input(name: str) -> None:
    pixels = 2 * 8 * 8
    sizes = [sorted(torch.Size(s).numel() for s in saved_tensors(name, make).values()) for make in (None, frozen_down)]
    assert sizes == [[pixels * 64], [pixels * 4, pixels * 64]]


@pytest.mark.parametrize("module", [lora, lora_fa])
def test_lora_and_lora_fa_load_each_others_files_and_compute_the_same(module: ModuleType) -> None:
    models, others = toy_models(6), toy_models(6)
    network = lora_fa.create_network(1.0, 4, 2, None, *models, **CONV)
    randomize(network, 7)
    network.apply_to(*models)
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    other, tensors = module.create_network_from_weights(1.0, "x", None, *others, weights)
    other.apply_to(*others)
    other.load_state_dict(tensors)
    for got, expected in zip(outputs(others, 8), outputs(models, 8), strict=True):
        torch.testing.assert_close(got, expected, **FLOAT32_SAME_MATH)
    other.remove()
    merged, tensors = module.create_network_from_weights(1.0, "x", None, *others, weights, for_inference=True)
    merged.merge_to(*others, tensors, torch.float32, "cpu")
    for got, expected in zip(outputs(others, 8), outputs(models, 8), strict=True):
        torch.testing.assert_close(got, expected, **FLOAT32_SAME_MATH)


def test_training_a_file_further_keeps_its_down_factors() -> None:
    models = toy_models(9)
    source = lora.create_network(1.0, 4, 2, None, *models)
    randomize(source, 10)
    network, weights = lora_fa.create_network_from_weights(1.0, "x", None, *models, source.state_dict())
    network.load_state_dict(weights)
    for key, tensor in source.state_dict().items():
        assert torch.equal(network.state_dict()[key], tensor)


def test_a_loraplus_ratio_only_multiplies_the_rate_and_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    models = toy_models(11)
    with caplog.at_level(logging.WARNING):
        network = lora_fa.create_network(1.0, 4, 2, None, *models, loraplus_unet_lr_ratio="8")
    network.apply_to(*models)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-3, 1e-3)
    assert dict(zip(names, (group["lr"] for group in groups), strict=True)) == {"textencoder": 1e-4, "unet plus": 8e-3}
    assert "loraplus_unet_lr_ratio: networks.lora_fa trains up factors only" in caplog.text


def test_limiting_the_norm_of_a_change_scales_only_its_up_factor() -> None:
    network = lora_fa.create_network(1.0, 4, 2, None, *toy_models(15), **CONV)
    randomize(network, 16)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.apply_max_norm_regularization(0.5, "cpu")
    for name, adapter in network.adapters.items():
        assert torch.equal(network.state_dict()[f"{name}.lora_down.weight"], before[f"{name}.lora_down.weight"])
        assert adapter.change.weight().norm() <= 0.5 * 1.0001
