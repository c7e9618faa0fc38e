"""DoRA: magnitudes per input column or output row, none for one output; norms without the full matrix."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from library.architectures.specs import list_specs
from library.checkpoints.compatibility import count_outputs, is_dora_per_output, readings
from library.training.models.preflight import models_on_meta_device
from library.training.step.context import Models
from networks import lora_krea2
from networks.core.changes.adapter import Adapter
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.dora import CANCELLED, EPS, Decompose, scale_columns
from networks.core.changes.dropout import Dropout
from networks.core.changes.low_rank import LowRank
from networks.core.changes.tucker import Tucker
from networks.core.network.network import AdapterNetwork
from tests.running import STARTED, Finished, make_images
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, module_of
from tests.unit.networks.test_adapter import LAYERS

NO_DROPOUT = Dropout()
KERNELS_3X3 = [name for name in LAYERS if name.startswith("3x3")]
CASES = [(name, LowRank) for name in LAYERS] + [(name, Tucker) for name in KERNELS_3X3]


def frozen(make: Callable[[], nn.Module], seed: int, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    return make().requires_grad_(False).to(dtype)


def decomposed(
    layer: Any,
    seed: int,
    delta: type = LowRank,
    drops: Dropout = NO_DROPOUT,
    multiplier: float = 1.0,
    has_scalar: bool = False,
    is_constant: bool = False,
    is_per_output: bool = False,
) -> Adapter:
    """Return an adapter with random weights, rank 3 and alpha 2, in the dtype of the layer."""
    join = Decompose(layer.weight, is_constant, is_per_output)
    adapter = adapter_on(layer, delta(layer, 3), 2.0, join, drops, multiplier, has_scalar)
    adapter.change.to(layer.weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.change.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def with_weight(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return linear(x, weight, layer.bias)
    return conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation)


def product_of(adapter: Adapter) -> Tensor:
    """Return up @ down, by einsum over the axes of the factors."""
    up, down = adapter.change.get_parameter("lora_up.weight"), adapter.change.get_parameter("lora_down.weight")
    if down.dim() == 2:
        return torch.einsum("or,ri->oi", up, down)
    if "lora_mid.weight" in dict(adapter.change.named_parameters()):
        mid = adapter.change.get_parameter("lora_mid.weight")
        return torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))
    return torch.einsum("or,rihw->oihw", up.flatten(1), down)


def formula(layer: Any, adapter: Adapter, multiplier: float, is_constant: bool = False) -> Tensor:
    """W0 + s (m (W0 + dW) / |W0 + dW| - W0), computed with full matrices."""
    scalar = 1.0 if adapter.change.scalar is None else adapter.change.scalar
    full = layer.weight + product_of(adapter) * scalar * 2.0 / 3
    is_per_output = adapter.change.decomposition.is_per_output
    axes = [1 if is_per_output else 0, 2, 3][: full.dim() - 1]
    norm = full.square().sum(axes, keepdim=True).sqrt() + (0 if is_per_output else EPS)
    norm = norm.detach() if is_constant else norm
    assert adapter.change.dora_scale is not None
    return layer.weight + multiplier * (adapter.change.dora_scale * full / norm - layer.weight)


@pytest.mark.parametrize("is_per_output", [False, True])
@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("has_scalar", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 0.7])
@pytest.mark.parametrize(("name", "delta"), CASES)
def test_output_gradients_and_merged_weight_match_the_formula(
    name: str, delta: type, multiplier: float, has_scalar: bool, is_constant: bool, is_per_output: bool
) -> None:
    make, shape = LAYERS[name]
    layer = frozen(make, 1201)
    adapter = decomposed(layer, 1202, delta, NO_DROPOUT, multiplier, has_scalar, is_constant, is_per_output)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    full_weight = formula(layer, adapter, multiplier, is_constant)
    torch.testing.assert_close(adapter.merged()["weight"], full_weight, **FLOAT64)
    expected = with_weight(layer, x, full_weight)
    seen_by = torch.randn_like(expected)
    learned = (x, *adapter.change.parameters())
    expected_grads = torch.autograd.grad((expected * seen_by).sum(), learned)
    adapter.install()
    y = layer(x)
    torch.testing.assert_close(y, expected, **FLOAT64)
    for actual, expected_grad in zip(torch.autograd.grad((y * seen_by).sum(), learned), expected_grads, strict=True):
        torch.testing.assert_close(actual, expected_grad, **FLOAT64)


@pytest.mark.parametrize("is_per_output", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_an_untrained_adapter_changes_no_bit(name: str, dtype: torch.dtype, is_per_output: bool) -> None:
    make, shape = LAYERS[name]
    layer = frozen(make, 1211, dtype)
    adapter = adapter_on(layer, LowRank(layer, 3), 2.0, Decompose(layer.weight, is_per_output=is_per_output))
    x = torch.randn(shape).to(dtype)
    alone = layer(x)
    adapter.install()
    assert torch.equal(layer(x), alone)


def test_magnitudes_have_the_usual_shape_and_start_as_column_norms() -> None:
    for name, shape in (("linear", (1, 7)), ("3x3", (1, 7, 1, 1))):
        layer = frozen(LAYERS[name][0], 1221)
        magnitudes = Decompose(layer.weight).magnitudes()
        assert magnitudes.shape == shape
        columns = layer.weight.transpose(0, 1).flatten(1)
        torch.testing.assert_close(magnitudes.flatten(), columns.norm(dim=1) + EPS, **FLOAT64)


class Largest(TorchDispatchMode):
    """A dispatch mode that records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        if not func.is_view and not str(func).startswith(("aten.t.", "aten.detach", "aten.view", "aten.transpose")):
            self.num_values = max([self.num_values, *(t.numel() for t in tensors)])
        return result


@pytest.mark.parametrize("is_per_output", [False, True])
def test_neither_pass_creates_a_tensor_as_large_as_the_weight(is_per_output: bool) -> None:
    layer = frozen(lambda: nn.Linear(96, 128), 1231, torch.float32)
    adapter = decomposed(layer, 1232, is_per_output=is_per_output)
    adapter.install()
    x = torch.randn(2, 96, requires_grad=True)
    with Largest() as largest:
        layer(x).square().sum().backward()
    assert 0 < largest.num_values <= 3 * 128  # rank times outputs
    with Largest() as largest:
        adapter.merged()["weight"]
    assert largest.num_values == 96 * 128


@pytest.mark.parametrize("delta", [LowRank, Tucker])
def test_norms_of_a_16_bit_weight_in_any_memory_format_match_float64(
    delta: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("networks.core.changes.dora.CHUNK_VALUES", 200)  # rows in several chunks
    layer = frozen(lambda: nn.Conv2d(7, 20, 3, padding=1), 1241, torch.float32).to(torch.bfloat16)
    layer.to(memory_format=torch.channels_last)
    adapter = decomposed(layer, 1242, delta)
    module_of(adapter).float()
    assert adapter.change.dora_scale is not None
    wide = frozen(lambda: nn.Conv2d(7, 20, 3, padding=1), 1241)
    wide.weight.data = layer.weight.double()
    exact = decomposed(wide, 1243, delta)
    exact.change.load_state_dict(adapter.change.state_dict())
    learned = [name for name, _ in adapter.change.named_parameters()]
    torch.testing.assert_close(adapter.merged()["weight"].double(), formula(wide, exact, 1.0), **FLOAT32_SAME_MATH)
    columns = columns_of(adapter)
    torch.testing.assert_close(columns.double(), columns_of(exact), **FLOAT32_SAME_MATH)
    got = torch.autograd.grad(columns.sum(), list(adapter.change.parameters()), allow_unused=True)
    expected = torch.autograd.grad(columns_of(exact).sum(), list(exact.change.parameters()), allow_unused=True)
    for name, actual, reference in zip(learned, got, expected, strict=True):
        assert actual is not None and reference is not None, name
        torch.testing.assert_close(actual.double(), reference, **FLOAT32_SAME_MATH)


def columns_of(adapter: Adapter) -> Tensor:
    assert adapter.change.dora_scale is not None
    weight = adapter.target.module.weight
    assert isinstance(weight, Tensor)
    return adapter.change.decomposition.scales(
        weight, adapter.change.dora_scale, *adapter.change.factors(), adapter.change.scale
    )


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-5])
def test_columns_almost_cancelled_by_the_change_keep_their_precision(share: float) -> None:
    """Three of nine columns keep `share` of their norm; the square of the smallest is below float32 precision."""
    torch.manual_seed(1251)
    layer = nn.Linear(9, 40, bias=False).requires_grad_(False)
    adapter = decomposed(layer, 1252)
    with torch.no_grad():
        product = torch.zeros(40, 9)
        product[:, 2:5] = layer.weight[:, 2:5] * (share - 1)
        u, s, v = torch.linalg.svd(product.double())
        adapter.change.get_parameter("lora_up.weight").copy_((u[:, :3] * s[:3]) * 1.5)  # alpha / rank is 2 / 3
        adapter.change.get_parameter("lora_down.weight").copy_(v[:3])
    full = layer.weight.double() + product_of(adapter).double() * 2 / 3
    norms = full.norm(dim=0)
    assert ((norms / layer.weight.double().norm(dim=0)) ** 2 < CANCELLED).sum() == (3 if share < 0.03 else 0)
    assert adapter.change.dora_scale is not None
    expected = adapter.change.dora_scale.double().flatten() / (norms + EPS)
    got = columns_of(adapter).double().flatten()
    # A remaining column is the difference of two float32 numbers near |W0|, which limits its precision.
    torch.testing.assert_close(got, expected, rtol=1e-6 / share, atol=1e-6)
    grads = torch.autograd.grad(columns_of(adapter).sum(), list(adapter.change.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_the_expansion_alone_loses_the_precision_that_the_direct_sum_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1261)
    layer = nn.Linear(9, 4000, bias=False).requires_grad_(False)
    adapter = decomposed(layer, 1262)
    with torch.no_grad():
        adapter.change.get_parameter("lora_up.weight").copy_(layer.weight[:, 2:5] * -1.5 * (1 - 2e-3))
        adapter.change.get_parameter("lora_down.weight").copy_(torch.eye(9)[2:5])
    norms = (layer.weight.double() + product_of(adapter).double() * 2 / 3).norm(dim=0)
    assert adapter.change.dora_scale is not None
    expected = adapter.change.dora_scale.double().flatten() / (norms + EPS)

    def worst() -> float:
        return ((columns_of(adapter).flatten() - expected) / expected).abs().max().item()

    guarded = worst()
    monkeypatch.setattr("networks.core.changes.dora.CANCELLED", 0.0)
    assert guarded < 1e-4 < 1e-3 < worst()


def test_rows_almost_cancelled_by_the_change_keep_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expansion sums the squares of rows of 4000 numbers; three rows keep 1/500 of their norm."""
    torch.manual_seed(1265)
    layer = nn.Linear(4000, 9, bias=False).requires_grad_(False)
    adapter = decomposed(layer, 1266, is_per_output=True)
    with torch.no_grad():
        adapter.change.get_parameter("lora_down.weight").copy_(layer.weight[2:5] * -1.5 * (1 - 2e-3))
        adapter.change.get_parameter("lora_up.weight").copy_(torch.eye(9)[:, 2:5])
    norms = (layer.weight.double() + product_of(adapter).double() * 2 / 3).norm(dim=1)
    assert adapter.change.dora_scale is not None
    expected = adapter.change.dora_scale.double().flatten() / norms

    def worst() -> float:
        return ((columns_of(adapter).flatten() - expected) / expected).abs().max().item()

    guarded = worst()
    grads = torch.autograd.grad(columns_of(adapter).sum(), list(adapter.change.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    monkeypatch.setattr("networks.core.changes.dora.CANCELLED", 0.0)
    assert guarded < 1e-4 < 1e-3 < worst()


@pytest.mark.parametrize(("factor", "is_per_output"), [("lora_up.weight", True), ("lora_down.weight", False)])
def test_empty_rows_and_columns_stay_finite(factor: str, is_per_output: bool) -> None:
    layer = frozen(lambda: nn.Linear(7, 5), 1275, torch.float32)
    empty = (3, slice(None)) if is_per_output else (slice(None), 3)
    layer.weight[empty] = 0
    adapter = decomposed(layer, 1276, is_per_output=is_per_output)
    with torch.no_grad():
        adapter.change.get_parameter(factor)[empty] = 0
    merged = adapter.merged()["weight"]
    assert merged.isfinite().all() and not merged[empty].any()
    adapter.install()
    y = layer(torch.randn(4, 7))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.change.parameters())


def test_columns_are_scaled_in_float32_and_rounded_once() -> None:
    torch.manual_seed(1281)
    x = torch.randn(400, 3).bfloat16()
    columns = torch.tensor([[1.0, 1.013, 0.9935]])
    scaled = scale_columns(x, columns)
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, (x.float() * columns).bfloat16())
    assert not torch.equal(scaled, x * columns.bfloat16())


@pytest.mark.parametrize("is_per_output", [False, True])
@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_under_autocast_output_is_bf16_and_gradients_are_float32(name: str, is_per_output: bool) -> None:
    make, shape = LAYERS[name]
    layer = frozen(make, 1291, torch.float32)
    adapter = decomposed(layer, 1292, Tucker if name == "3x3" else LowRank, is_per_output=is_per_output)
    x = torch.randn(shape)
    adapter.install()
    exact, scales = layer(x), adapter.change.scales()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(adapter.change.scales(), scales), "norms are computed in float32"
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.08)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.change.parameters())


@pytest.mark.parametrize("drops", [Dropout(neuron=0.5), Dropout(rank=0.5), Dropout(module=0.5)])
def test_a_checkpointed_layer_gives_the_same_gradients(drops: Dropout) -> None:
    layer = frozen(LAYERS["3x3"][0], 1301)
    adapter = decomposed(layer, 1302, Tucker, drops, has_scalar=True)
    adapter.install()
    x = torch.randn(LAYERS["3x3"][1], dtype=torch.float64, requires_grad=True)
    learned = (x, *adapter.change.parameters())
    torch.manual_seed(1303)
    seen = set()
    for _ in range(4):
        state = torch.get_rng_state()
        plain = torch.autograd.grad(layer(x).square().sum(), learned, allow_unused=True)
        torch.set_rng_state(state)
        recomputed = torch.autograd.grad(
            checkpoint(layer, x, use_reentrant=False).square().sum(), learned, allow_unused=True
        )
        for expected, actual in zip(plain, recomputed, strict=True):
            assert (expected is None) == (actual is None)
            if expected is not None and actual is not None:
                torch.testing.assert_close(expected, actual, **FLOAT64)
        seen.add(plain[1] is None)
    assert seen == ({True, False} if drops.module else {False})


def test_rank_dropout_affects_the_low_rank_path_but_not_the_norm() -> None:
    layer = frozen(LAYERS["linear"][0], 1311)
    adapter = decomposed(layer, 1312, drops=Dropout(rank=0.4))
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    columns = columns_of(adapter)
    adapter.install()
    torch.manual_seed(1313)
    y = layer(x)
    torch.manual_seed(1313)
    keep_BR = (torch.rand(2, 3) > 0.4).double()
    up, down = adapter.change.get_parameter("lora_up.weight"), adapter.change.get_parameter("lora_down.weight")
    adapter.remove()
    for sample, keep_R, got in zip(x, keep_BR, y, strict=True):
        weight = layer.weight + (up * keep_R) @ down * (2.0 / 3) / (1 - 0.4)
        torch.testing.assert_close(got, linear(sample * columns, weight, layer.bias), **FLOAT64)
    assert 0 < keep_BR.mean() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_network_keeps_its_magnitudes_in_float32(dtype: torch.dtype) -> None:
    layer = frozen(LAYERS["linear"][0], 1321, torch.float32)
    adapter = decomposed(layer, 1322)
    assert adapter.change.dora_scale is not None
    before = adapter.change.dora_scale.detach().clone()
    adapter.change.to(dtype)
    assert adapter.change.get_parameter("lora_up.weight").dtype == dtype
    assert torch.equal(adapter.change.dora_scale, before)


# A layer with one output gets no magnitudes, which programs would take for one per output.

FLOAT32_EPS = torch.finfo(torch.float32).eps
PROJECTOR = "lora_unet_txtfusion_projector"
KINDS = ("networks.lora", "networks.loha", "networks.lokr")
DORA = {"dora_wd": "True"}
FAMILIES = sorted(BASES, key=lambda name: name != "krea2")


def comfyui_weight(weight: Tensor, change: Tensor, dora_scale: Tensor | None) -> Tensor:
    """Return the weight that ComfyUI computes from a change and its magnitudes.

    Magnitudes as many along the first axis as the weight has rows belong to the rows, and the norms are those of the
    base's rows. Others belong to the columns of the changed weight.
    """
    changed = weight + change
    if dora_scale is None:
        return changed
    of_rows = dora_scale.shape[0] == weight.shape[0]
    axes = [axis for axis in range(weight.dim()) if axis != (0 if of_rows else 1)]
    norms = torch.linalg.vector_norm(weight if of_rows else changed, dim=axes, keepdim=True)
    return changed * (dora_scale / (norms + FLOAT32_EPS))


def build_architecture(name: str, folder: Path) -> Any:
    """Write a tiny base model and open it by its script's options."""
    base = BASES[name]
    args = importlib.import_module(base.script).setup_parser().parse_args(base.build(folder))
    return STARTED[base.script].build(STARTED[base.script].options.from_args(args))


def network_on(models: Models, module: str, **arguments: str) -> AdapterNetwork:
    text_encoder, denoiser = models.network_view
    network: AdapterNetwork = importlib.import_module(module).create_network(
        1.0, 2, 1.0, None, text_encoder, denoiser, **DORA, **arguments
    )
    return network


@pytest.mark.parametrize("name", first_is_fast(FAMILIES))
def test_programs_take_no_magnitudes_of_any_base_model_for_those_of_outputs(name: str, tmp_path: Path) -> None:
    models = models_on_meta_device(build_architecture(name, tmp_path))
    for module in KINDS:
        with torch.device("meta"):
            network = network_on(models, module, **({"conv_dim": "2"} if name in ("sd", "sd2", "sdxl") else {}))
        num_magnitudes = 0
        for adapter in network.adapters.values():
            magnitudes = adapter.change.stored_tensors().get("dora_scale")
            if magnitudes is not None:
                num_magnitudes += 1
                assert magnitudes.shape[0] != adapter.target.module.weight.shape[0], adapter.target.name
        assert num_magnitudes > 10


@pytest.fixture
def krea2(tmp_path: Path) -> Models:
    """Krea 2 with weights, whose projector of text states has one output."""
    arch = build_architecture("krea2", tmp_path)
    denoiser = arch.load.denoiser().float()
    return Models(denoiser, [], None, arch.view([], denoiser))


def perturb(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(831)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("module", ["networks.lora", "networks.lokr"])
def test_comfyui_computes_what_was_trained(krea2: Models, module: str, is_trained: bool) -> None:
    network = network_on(krea2, module)
    if is_trained:
        perturb(network)
    for name, adapter in network.adapters.items():
        change, weight = adapter.change, adapter.target.module.weight
        assert isinstance(change, ScaledDelta)
        read = comfyui_weight(weight, change.weight(), change.stored_tensors().get("dora_scale"))
        trained = adapter.merged()["weight"] if is_trained else weight
        torch.testing.assert_close(read, trained, **FLOAT32_SAME_MATH, msg=name)
    assert "dora_scale" not in network.adapters[PROJECTOR].change.stored_tensors()


def test_the_log_says_so_once(krea2: Models, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        network_on(krea2, "networks.lora")
    assert caplog.text.count(f"{PROJECTOR} has one output and gets no magnitudes") == 1


# Files and states of earlier versions


@pytest.fixture
def earlier(krea2: Models, monkeypatch: pytest.MonkeyPatch) -> AdapterNetwork:
    """Return the network of an earlier version, with magnitudes in every layer."""
    with monkeypatch.context() as patch:
        patch.setattr("networks.core.network.members.can_have_magnitudes", lambda layer: True)
        network = network_on(krea2, "networks.lora")
    perturb(network)
    return network


def test_an_earlier_file_is_loaded_as_it_was_trained(
    krea2: Models, earlier: AdapterNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = str(tmp_path / "earlier.safetensors")
    earlier.save_weights(file, None, {})
    network = network_on(krea2, "networks.lora")
    network.load_weights(file)
    assert f"{PROJECTOR} keeps the magnitudes (DoRA) that it has in {file}" in caplog.text
    from_file, _ = lora_krea2.create_network_from_weights(1.0, file, None, [], krea2.network_view[1])
    from_file.load_weights(file)
    for_merging, tensors = lora_krea2.create_network_from_weights(
        1.0, file, None, [], krea2.network_view[1], for_inference=True
    )
    merged = {part.layer: part.merged(getattr(part.layer, part.parameter)) for part in for_merging.merging(tensors)}
    for name, adapter in earlier.adapters.items():
        expected = adapter.merged()["weight"]
        for other in (network, from_file):
            torch.testing.assert_close(other.adapters[name].merged()["weight"], expected, **FLOAT32_SAME_MATH)
        torch.testing.assert_close(merged[adapter.target.module], expected, **FLOAT32_SAME_MATH)


def test_an_earlier_state_gives_the_parameters_it_was_trained_with(krea2: Models, earlier: AdapterNetwork) -> None:
    state = earlier.state_dict()
    network = network_on(krea2, "networks.lora")
    network.prepare_for({name: tensor.shape for name, tensor in state.items()}, "a state")
    network.load_state_dict(state)
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in earlier.named_parameters()]
    expected = earlier.adapters[PROJECTOR].merged()["weight"]
    assert torch.equal(network.adapters[PROJECTOR].merged()["weight"], expected)


@pytest.mark.slow
def test_an_earlier_run_is_resumed_as_it_began(
    train: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_images(tmp_path / "data" / "1_thing", 2).parent
    arguments = [
        *BASES["krea2"].build(tmp_path), "--train_data_dir", str(data), "--resolution", "64", "--output_dir",
        str(tmp_path / "out"), "--network_module", "networks.lora", "--network_dim", "2", "--network_args",
        "dora_wd=True", "--learning_rate", "1e-2", "--seed", "5", "--save_state", "--max_data_loader_n_workers", "0",
        "--max_train_steps", "3",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("networks.core.network.members.can_have_magnitudes", lambda layer: True)
        whole = train([*arguments, "--output_name", "whole", "--save_every_n_steps", "1"], "krea2_train_network").ok()
    state = str(tmp_path / "out" / "whole-step00000001-state")
    rest = train([*arguments, "--output_name", "rest", "--resume", state], "krea2_train_network").ok()
    assert rest.losses == whole.losses[1:]
    expected, actual = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("whole", "rest"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_an_earlier_file_is_said_to_act_differently(earlier: AdapterNetwork, krea2: Models, tmp_path: Path) -> None:
    for network, num_inexact in ((earlier, 4), (network_on(krea2, "networks.lora"), 0)):
        network.save_weights(str(tmp_path / "file.safetensors"), None, {})
        shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "file.safetensors").items()}
        by_program = {reading.program: reading for reading in readings(list_specs(), shapes, {})}
        for program in ("ComfyUI", "Forge", "A1111-style"):
            if by_program[program].amount != "none":
                assert len(by_program[program].inexact) == num_inexact
        assert (by_program["ComfyUI"].amount == "all") is (num_inexact == 0)


@pytest.mark.parametrize(
    "factors",
    [
        {"lora_down.weight": (4, 12), "lora_up.weight": (1, 4)},
        {"lora_A.weight": (4, 12), "lora_B.weight": (1, 4)},
        {"hada_w1_a": (1, 4), "hada_w1_b": (4, 12)},
        {"hada_w1_a": (4, 1), "hada_w1_b": (4, 12), "hada_t1": (4, 4, 3, 3)},
        {"lokr_w1": (1, 3), "lokr_w2": (1, 4)},
        {"lokr_w1_a": (1, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (1, 2), "lokr_w2_b": (2, 4)},
        {"lokr_w1": (1, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)},
    ],
)
def test_the_factors_tell_the_number_of_outputs(factors: dict[str, tuple[int, ...]]) -> None:
    assert count_outputs(factors) == 1
    assert is_dora_per_output({**factors, "dora_scale": (1, 12)})
    assert not is_dora_per_output(factors)
