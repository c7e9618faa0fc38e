"""Weight formats, and the frozen layers that are stored in them."""

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from library.base.errors import UserError
from library.memory import small_convolutions
from library.memory.codecs.codec import Codec
from library.memory.codecs.matmul_8bit import FP8
from library.memory.codecs.plain import Plain
from library.memory.devices import move_to_device
from library.memory.formats.fp8 import Fp8Rows
from library.memory.formats.int8 import Int8Rows, group_size, hadamard
from library.memory.frozen import FrozenLinear, freeze_layer, freeze_layers, layers_in_blocks
from library.memory.planner.counter import OperationCounter
from library.memory.planner.weights import Matrix, StorageCost
from networks import lora
from tests.running import ROOT
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.toy import randomize
from tests.unit.networks.toy_transformer import toy_transformer
from tests.weight_formats import CODECS


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outside = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False))])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(self.outside(x))
        return x


def frozen(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    return Model().requires_grad_(False).to(dtype)


def decoded_copy(model: nn.Module) -> nn.Module:
    """Return the model with plain layers that hold what the 8-bit ones decode to."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, FrozenLinear):
            weight = layer.weight
            for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
                delattr(layer, name)
            layer.__class__ = nn.Linear
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def test_only_layers_inside_blocks_are_encoded_at_one_byte_per_weight() -> None:
    model = frozen()
    assert freeze_layers(Fp8Rows(), layers_in_blocks(model).values()) == 2
    assert type(model.outside) is nn.Linear
    layer = model.blocks[0][0]
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"
    assert layer.codes.dtype == FP8 and layer.codes.shape == (24, 16)
    parameters = dict(layer.named_parameters())
    assert list(parameters) == ["bias", "codes", "scales"]
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert sum(p.numel() * p.element_size() for name, p in parameters.items() if name != "bias") == 24 * 16 + 24 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_within_a_sixteenth_regardless_of_its_row_scale(dtype: torch.dtype) -> None:
    model = frozen(dtype=dtype)
    layer = model.blocks[0][0]
    layer.weight[3] *= 1e-3
    layer.weight[5] = 0
    before = layer.weight.double()
    freeze_layers(Fp8Rows(), layers_in_blocks(model).values())
    after = layer.weight
    assert after.dtype == dtype
    limit = (before.abs() / 16).maximum(before.abs().amax(1, keepdim=True) * 2.0**-17)
    assert ((after.double() - before).abs() <= limit).all()
    assert not torch.equal(after.double(), before)
    assert (after[5] == 0).all()


ALL = {"plain": Plain(), **CODECS}


@pytest.mark.parametrize("codec", ALL.values(), ids=ALL)
def test_outputs_and_gradients_are_those_of_the_decoded_weight(codec: Codec) -> None:
    model = frozen()
    freeze_layers(codec, layers_in_blocks(model).values())
    plain = decoded_copy(model)
    results = []
    for module in (model, plain):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **FLOAT32_SAME_MATH)


def test_under_autocast_the_output_has_the_autocast_dtype() -> None:
    model = frozen(dtype=torch.bfloat16)
    freeze_layers(Fp8Rows(), layers_in_blocks(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0][0](torch.randn(2, 16)).dtype == torch.bfloat16


def test_the_backward_pass_keeps_no_decoded_weight() -> None:
    model = frozen()
    freeze_layers(Fp8Rows(), layers_in_blocks(model).values())
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(2, 16).requires_grad_())
    assert saved and not [t for t in saved if t.shape in ((24, 16), (16, 24))]


@pytest.mark.parametrize("codec", ALL.values(), ids=ALL)
def test_reading_the_weight_returns_a_copy(codec: Codec) -> None:
    layer = nn.Linear(6, 4).requires_grad_(False)
    freeze_layer(codec, layer)
    read = layer.weight
    read.fill_(7)
    assert not (layer.weight == 7).any()


def test_a_network_that_takes_the_weight_away_is_refused_with_the_options_to_remove() -> None:
    """LyCORIS' full weights do so."""
    layer = nn.Linear(6, 4)
    freeze_layer(Plain(), layer)
    with pytest.raises(UserError, match=r"--network_module replaces .* remove --blocks_to_swap"):
        del layer.weight
    assert layer.weight.shape == (4, 6)


def test_the_backward_pass_reads_the_weight_from_its_handle_again() -> None:
    """By then the layer's own tensors may hold another layer's weight."""
    torch.manual_seed(8)
    layer = nn.Linear(6, 4, bias=False).requires_grad_(False)
    before = layer.weight.clone()
    freeze_layer(Plain(), layer)
    assert isinstance(layer, FrozenLinear)
    requests: list[str] = []
    values = before.clone()
    layer.handle = lambda: requests.append("") or {"values": values}  # type: ignore[func-returns-value]
    layer.values.fill_(float("nan"))
    x = torch.randn(3, 6).requires_grad_()
    y = layer(x)
    assert len(requests) == 1
    y.sum().backward()
    assert len(requests) == 2
    torch.testing.assert_close(x.grad, before.sum(0).expand(3, 6), **FLOAT32_SAME_MATH)


@pytest.mark.parametrize(
    "arguments", [{}, {"dora_wd": "True"}, {"dora_wd": "True", "wd_on_output": "True"}, {"split_qkv": "True"}], ids=str
)
def test_adapters_train_as_on_the_decoded_weight(arguments: dict[str, str]) -> None:
    base = toy_transformer(0)
    assert freeze_layers(Fp8Rows(), layers_in_blocks(base).values()) > 0
    results = []
    for model in (base, decoded_copy(base)):
        network = lora.create_network(1.0, 3, 2, None, None, model, **arguments)
        randomize(network, 5)
        network.apply_to(None, model, False, True)
        network.eval()
        y = model(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2)))
        y.square().sum().backward()
        results.append((y.detach(), *(parameter.grad for parameter in network.parameters())))
        network.remove()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


WEIGHTS = {"linear": (70, 96), "conv": (70, 6, 3, 3), "odd": (6, 3, 3, 3), "row": (1, 64)}


def random_weight(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", [name for name in CODECS if name.startswith("nf4")])
def test_nf4_encodes_as_bitsandbytes_does(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode by hand: for rows not divisible by 64, the CPU kernel of bitsandbytes uses other factors."""
    from bitsandbytes.functional import dequantize_blockwise, get_4bit_type, quantize_4bit

    monkeypatch.setattr("library.memory.codecs.chunks.NUM_VALUES", 64 * 96)  # several chunks, the last one shorter
    weight = random_weight(shape, 9)
    parts = CODECS[name].encode(weight)
    codes, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=name == "nf4_double")
    assert torch.equal(parts["codes"], codes)
    factors = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    numbers = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()[: weight.numel()]
    values = get_4bit_type("nf4", device="cpu")[numbers.int()]
    expected = (values * factors.repeat_interleave(64)[: weight.numel()]).reshape(shape)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(CODECS[name].decode(parts, weight.shape, dtype), expected.to(dtype))


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
def test_int8_is_within_half_a_step_of_its_row_scale(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.memory.codecs.chunks.NUM_VALUES", 64 * 96)
    weight = random_weight(shape, 10)
    if len(weight) > 1:
        weight[0] = 0
    parts = Int8Rows().encode(weight)
    step = weight.flatten(1).abs().amax(1) / 127
    off = (Int8Rows().decode(parts, weight.shape, torch.float32) - weight).flatten(1).abs().amax(1)
    assert (off <= step / 2 + 1e-6).all() and off.any()
    assert (parts["scales"] > 0).all(), "a NaN has no code, so a row of zeros must not divide by 0"


def test_rotation_spreads_an_outlier_over_its_group() -> None:
    """Without rotation, an input 30 times as large makes every row's step 30 times as large."""
    weight = random_weight((40, 512), 11)
    weight[:, 100] *= 30
    errors = []
    for codec in (Int8Rows(), Int8Rows(is_rotated=True)):
        off = codec.decode(codec.encode(weight), weight.shape, torch.float32) - weight
        errors.append(float(off.norm() / weight.norm()))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize(("num_inputs", "size"), [(3072, 256), (96, 32), (7, 1), (12, 4), (256, 256)])
def test_groups_are_the_largest_power_of_two_that_divides(num_inputs: int, size: int) -> None:
    assert group_size(num_inputs) == size
    matrix = hadamard(size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", CODECS)
def test_every_format_takes_the_planned_bytes_and_chunking_changes_no_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ((6, 27), (256, 512)):  # the first ends in a part of a group
        weight = random_weight(shape, 12).to(torch.bfloat16)
        unchunked = CODECS[name].encode(weight)
        num_bytes = sum(part.numel() * part.element_size() for part in unchunked.values())
        assert num_bytes == StorageCost.of(name).num_bytes(Matrix.of(weight))
    monkeypatch.setattr("library.memory.codecs.chunks.NUM_VALUES", 64 * 512)
    for key, part in CODECS[name].encode(weight).items():
        assert part.dtype == unchunked[key].dtype and torch.equal(
            part.view(torch.uint8), unchunked[key].view(torch.uint8)
        )


def test_every_format_file_is_offered_by_the_options() -> None:
    from library.options.machine.fit import FitOptions
    from library.options.machine.memory import PrecisionOptions

    names = tuple(sorted(path.stem for path in (ROOT / "library" / "memory" / "formats").glob("[!_]*.py")))
    for options, name in ((PrecisionOptions, "base_format"), (FitOptions, "fit_formats")):
        assert tuple(options.declarations()[name].choices) == names == tuple(CODECS)


def test_the_table_in_the_docs_lists_every_format_with_its_bytes() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    _, _, text = text.partition("| `--base_format` | bytes a weight |")
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([\d.]+) \|", text.partition("\n\n")[0])
    matrix = Matrix(3072, 3072, itemsize=2)
    expected = {name: f"{StorageCost.of(name).num_bytes(matrix) / matrix.num_values:.3f}" for name in CODECS}
    assert dict(rows) == expected


def test_listing_the_formats_imports_no_torch() -> None:
    code = "import sys; from library.options.machine.base_formats import BASE_FORMATS; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("codec", ALL.values(), ids=ALL)
@pytest.mark.parametrize("is_last", [False, True], ids=["contiguous", "channels_last"])
def test_convolutions_compute_with_the_decoded_weight(codec: Codec, is_last: bool) -> None:
    torch.manual_seed(13)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).requires_grad_(False)
    if is_last:
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact = copy.deepcopy(layer)
    freeze_layer(codec, layer)
    assert type(layer).__name__ == "Conv2d" and layer.weight.shape == exact.weight.shape
    exact.weight = nn.Parameter(layer.weight, requires_grad=False)
    results = []
    for module in (layer, exact):
        x = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(14)).requires_grad_()
        y = module(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **FLOAT32_SAME_MATH)


def test_only_layers_with_a_frozen_twin_are_frozen() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    odd = [Scaled(3, 3), nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")]
    layers = [*odd, nn.Conv1d(3, 3, 1), nn.LayerNorm(3), nn.Linear(3, 3)]
    assert freeze_layers(Plain(), layers) == 1 and type(odd[0]) is Scaled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_decoding_in_one_kernel_is_bit_identical_to_casting_first(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(98)
    weight = torch.randn(33, 65).bfloat16()
    parts = CODECS[name].encode(weight)
    assert torch.equal(
        CODECS[name].decode(parts, weight.shape, dtype), parts["codes"].to(dtype) * parts["scales"].to(dtype)
    )


def test_int8_weights_are_decoded_without_a_copy_of_the_codes() -> None:
    """A GPU casts inside the kernel; a separate cast would write and read twice the bytes of the codes."""
    parts = {"codes": torch.ones(4, 4, dtype=torch.int8), "scales": torch.ones(4, 1)}
    with OperationCounter() as counter:
        Int8Rows().decode(parts, torch.Size((4, 4)), torch.bfloat16)
        counter.cut()
    assert counter.segments[0].launches == 2  # the cast of four scales, and the product


# Convolutions of few pixels against torch's own.

SHAPES = [
    # kernel, stride, padding, images
    (3, 1, 1, (2, 5, 3, 4)),
    (3, 2, 1, (1, 5, 6, 5)),
    (1, 1, 0, (2, 5, 4, 4)),
    (1, 2, 0, (1, 5, 5, 5)),
    (1, 1, 0, (2, 5, 9, 8)),  # more pixels than channels
    ((3, 2), (1, 2), (2, 0), (2, 5, 3, 6)),
]


@contextmanager
def count_calls() -> Iterator[list[str]]:
    """Record the calls that take the fast path, forward and backward."""
    fast_calls: list[str] = []

    def spying(name: str) -> Any:
        original = getattr(small_convolutions, name)

        def call(*args: Any) -> Tensor:
            fast_calls.append(name)
            result: Tensor = original(*args)
            return result

        return call

    with patch.multiple(small_convolutions, **{name: spying(name) for name in ("output", "input_gradient")}):
        yield fast_calls


def frozen_convolution(layer: nn.Conv2d) -> nn.Conv2d:
    placed = move_to_device(nn.Sequential(layer), torch.device("cpu")).requires_grad_(False)
    (inner,) = placed.children()
    assert isinstance(inner, nn.Conv2d)
    return inner


def trained_through(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y: Tensor = layer(x)
    y.backward(gradient)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "images"), SHAPES)
def test_outputs_and_gradients_are_those_of_float64(
    kernel: Any, stride: Any, padding: Any, images: tuple[int, ...], stored: bool
) -> None:
    """Sums are in another order: 45 float32 products, 1e-6 of the largest value."""
    torch.manual_seed(31)
    layer = nn.Conv2d(5, 67, kernel, stride, padding)
    exact = deepcopy(layer).double()
    x = torch.randn(images).to(memory_format=torch.channels_last)
    gradient = torch.randn_like(layer(x))
    if stored:
        freeze_layer(Plain(), layer)
    adapted = frozen_convolution(layer)
    with count_calls() as fast_calls:
        y, x_gradient = trained_through(adapted, x, gradient)
    assert fast_calls == ["output", "input_gradient"]
    exact_y, exact_gradient = trained_through(exact, x.double(), gradient.double())
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-6, atol=1e-6 * exact_y.abs().max().item())
    torch.testing.assert_close(
        x_gradient.double(), exact_gradient, rtol=1e-6, atol=1e-6 * exact_gradient.abs().max().item()
    )
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (nn.Conv2d(5, 9, 3, padding=1), 3),
        (nn.Conv2d(6, 12, 3, padding=1, groups=2), 3),
        (nn.Conv2d(5, 12, 3, padding=2, dilation=2), 3),
        (nn.Conv2d(5, 12, 3, padding="same"), 3),
        (nn.Conv2d(5, 12, 3, padding=1, padding_mode="circular"), 3),
    ],
    ids=["as many pixels as channels", "groups", "dilation", "named padding", "circular"],
)
def test_cases_without_a_gain_or_with_another_geometry_are_left_to_torch(layer: nn.Conv2d, side: int) -> None:
    x = torch.randn(1, layer.in_channels, side, side, generator=torch.Generator().manual_seed(37))
    expected = layer(x)
    with count_calls() as fast_calls:
        y = frozen_convolution(layer)(x)
    assert not fast_calls
    torch.testing.assert_close(y, expected)


def test_a_weight_that_trains_gets_its_gradient() -> None:
    torch.manual_seed(41)
    layer = frozen_convolution(nn.Conv2d(5, 67, 3, padding=1)).requires_grad_(True)
    with count_calls() as fast_calls:
        layer(torch.randn(1, 5, 3, 3)).square().sum().backward()
    assert not fast_calls and layer.weight.grad is not None


def test_autocast_sets_the_compute_dtype_and_input_gradients_keep_the_input_dtype() -> None:
    torch.manual_seed(43)
    layer = nn.Conv2d(5, 67, 3, padding=1).bfloat16()
    exact = deepcopy(layer).double()
    adapted = frozen_convolution(layer)
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    with count_calls() as fast_calls:
        with torch.autocast("cpu", torch.bfloat16):
            y = adapted(x)
        y.float().sum().backward()
    assert fast_calls == ["output", "input_gradient"] and y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact(x.detach().bfloat16().double()), rtol=2**-7, atol=2**-7)


def test_operations_are_counted_as_for_a_plain_convolution() -> None:
    layer = nn.Conv2d(5, 67, 3, padding=1)
    x = torch.randn(2, 5, 3, 4, requires_grad=True)

    def operations(convolution: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            convolution(x).sum().backward()
        total: int = counter.get_total_flops()
        return total

    assert (
        operations(layer.requires_grad_(False)) == operations(frozen_convolution(layer)) == 2 * 2 * 67 * 5 * 9 * 2 * 12
    )
