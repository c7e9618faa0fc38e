"""Products with 8-bit codes: their errors, the values they are exact for, and the shapes that their kernels need."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.memory import fused_kernels
from library.memory.codecs.codec import Codec
from library.memory.codecs.matmul_8bit import FP8, Codes
from library.memory.formats.int8 import rotate
from library.memory.frozen import freeze_layer, freeze_layers, multiply_codes
from library.memory.fused_kernels import count_fused
from library.memory.planner.counter import OperationCounter
from library.memory.products_8bit import columns_first, fused, input_gradient, output, rounded_of, scaled_of
from tests.tolerances import FLOAT32_SAME_MATH
from tests.weight_formats import CODECS, EIGHT_BIT_FORMATS


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(name: str, weight: Tensor) -> tuple[Codes, Tensor]:
    """Return the codes of a weight and their decoded values in float64."""
    codec = CODECS[name]
    parts = codec.encode(weight)
    codes = codec.codes(parts)
    assert codes is not None
    return codes, codec.decode(parts, weight.shape, torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


# Measured: y is off by 4.4, 0.66 and 1.4 %, dx by 0.8, 0.8 and 2.6 %; full size: benchmarks/RESULTS.md.
BOUNDS = {"int8": (0.06, 0.012), "int8_rotated": (0.01, 0.012), "fp8": (0.03, 0.035)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EIGHT_BIT_FORMATS)
def test_products_are_near_those_of_the_decoded_weight_with_an_outlier_channel(name: str, dtype: torch.dtype) -> None:
    """One input channel is 30 times as large as the others, and token gradients differ by a factor of 1000."""
    weight, decoded = stored(name, 0.02 * random(96, 256, seed=1))
    x = random(3, 24, 256, seed=2)
    x[..., 7] *= 30
    gradient = random(72, 96, seed=3) * torch.logspace(-3, 0, 72)[:, None]
    x, gradient = x.to(dtype), gradient.to(dtype)
    y, dx = output(x, weight, None), input_gradient(gradient, weight)
    assert y.dtype == dx.dtype == dtype and y.shape == (3, 24, 96)
    errors = relative_error(y, x.double() @ decoded.T), relative_error(dx, gradient.double() @ decoded)
    assert all(error < bound for error, bound in zip(errors, BOUNDS[name], strict=True)), errors
    # A larger token does not swamp a smaller one: each is as accurate as all of them together.
    tokens = [relative_error(dx[i], gradient[i].double() @ decoded) for i in range(len(dx))]
    assert max(tokens) < 2 * BOUNDS[name][1]


# Measured: at most 1.2e-4, 2.5e-5 and 6e-4; with a single rounding the same tokens are off by 3.4, 0.4 and 1.0 %.
OF_FEW = {"int8": 3e-4, "int8_rotated": 1e-4, "fp8": 2e-3}


@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("name", EIGHT_BIT_FORMATS)
def test_a_few_tokens_are_multiplied_with_twice_as_many_bits(name: str, num_tokens: int) -> None:
    """A block's modulation is a single token per image; some are zero."""
    weight, decoded = stored(name, 0.02 * random(96, 256, seed=21))
    x, gradient = random(num_tokens, 256, seed=22), random(num_tokens, 96, seed=23)
    x[:, 7] *= 30
    y, dx = output(x, weight, None), input_gradient(gradient, weight)
    errors = relative_error(y, x.double() @ decoded.T), relative_error(dx, gradient.double() @ decoded)
    assert max(errors) < OF_FEW[name], errors
    assert not output(torch.zeros(num_tokens, 256), weight, None).any()


# Before operations were fused fp8 took 22 bytes for a value of y in bf16, and int8, whose products are int32, 34.
@pytest.mark.parametrize(("name", "most_bytes"), [("fp8", 6), ("int8", 10)])
def test_scales_are_applied_in_one_kernel(name: str, most_bytes: int) -> None:
    """Bytes that a GPU reads and writes for each value of y and of dx, besides the factors of the product."""
    weight, mode = stored(name, random(2048, 32, seed=27))[0], FakeTensorMode()
    codes_OI, scales, x = (mode.from_tensor(t) for t in (weight.codes_OI, weight.scales, random(512, 32, seed=28)))
    with mode:
        x = x.bfloat16()
        tall = Codes(codes_OI.t().contiguous(), scales[:32])
    for call in (lambda: output(x, Codes(codes_OI, scales), None), lambda: input_gradient(x, tall)):
        counter = OperationCounter()
        with mode, count_fused(), counter:
            call()
        assert (counter.moved - codes_OI.numel()) / (512 * 2048) < most_bytes + 0.2  # x is a 64th of y


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT_BIT_FORMATS)
def test_compiled_operations_are_as_near_the_decoded_weight_as_eager_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, decoded = stored(name, 0.02 * random(96, 256, seed=30))
    x, gradient, bias = random(24, 256, seed=31).bfloat16(), random(24, 96, seed=32).bfloat16(), random(96, seed=33)
    eager = output(x, weight, bias.bfloat16()), input_gradient(gradient, weight)
    torch.compiler.reset()
    fused.cache_clear()
    monkeypatch.setattr(fused_kernels, "compiles_for", lambda device: True)
    compiled = output(x, weight, bias.bfloat16()), input_gradient(gradient, weight)
    assert all(fused(scaled_of).compiled.values()) and fused(rounded_of).compiled
    fused.cache_clear()
    for ours, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))
    exact = x.double() @ decoded.T + bias.bfloat16().double(), gradient.double() @ decoded
    for ours, wanted, bound in zip(compiled, exact, BOUNDS[name], strict=True):
        assert relative_error(ours, wanted) < bound


def test_rotation_keeps_an_outlier_from_spoiling_other_channels() -> None:
    x = random(40, 512, seed=4)
    x[:, 100] *= 30
    errors = {}
    for name in ("int8", "int8_rotated"):
        weight, decoded = stored(name, random(48, 512, seed=5))
        errors[name] = relative_error(output(x, weight, None), x.double() @ decoded.T)
    assert errors["int8_rotated"] < errors["int8"] / 3


def make_exact_codes(shape: tuple[int, int], kind: torch.dtype, seed: int) -> Tensor:
    """Return values that the codes hold exactly, with the largest code in each row, so that a token's factor is 1."""
    if kind == torch.int8:
        numbers = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float()
        numbers[:, 0] = 127
        return numbers
    numbers = (100 * random(*shape, seed=seed)).clamp(-400, 400).to(kind).float()
    numbers[:, 0] = 448
    return numbers


@pytest.mark.parametrize("kind", [torch.int8, FP8, torch.float8_e5m2], ids=str)
def test_values_that_8_bits_represent_are_multiplied_exactly(kind: torch.dtype) -> None:
    """Row factors are powers of two, so nothing is rounded; fp8 sums are in float32."""
    scales_O1 = torch.exp2(torch.arange(32) % 5 - 6.0)[:, None]
    codes_OI = make_exact_codes((32, 48), kind, seed=6).to(kind)
    weight = Codes(codes_OI, scales_O1)
    decoded, bias = codes_OI.double() * scales_O1.double(), random(32, seed=7)
    x = make_exact_codes((5, 48), torch.int8 if kind == torch.int8 else FP8, seed=8)
    y = output(x, weight, bias)
    torch.testing.assert_close(y.double(), x.double() @ decoded.T + bias.double(), **FLOAT32_SAME_MATH)
    gradient = make_exact_codes((5, 32), torch.int8 if kind == torch.int8 else FP8, seed=9) / scales_O1.T
    dx = input_gradient(gradient, weight)
    torch.testing.assert_close(dx.double(), gradient.double() @ decoded, **FLOAT32_SAME_MATH)


def test_per_tensor_scales_and_rotated_codes_of_a_file_are_multiplied() -> None:
    codes_OI = make_exact_codes((16, 64), torch.int8, seed=10).to(torch.int8)
    weight = Codes(codes_OI, torch.tensor(0.25), rotate)
    decoded = rotate(0.25 * codes_OI.double())
    x = rotate(make_exact_codes((20, 64), torch.int8, seed=11))  # rotating again gives integers
    torch.testing.assert_close(output(x, weight, None).double(), x.double() @ decoded.T, rtol=1e-4, atol=1e-2)
    gradient = make_exact_codes((20, 16), torch.int8, seed=12)
    torch.testing.assert_close(
        input_gradient(gradient, weight).double(), gradient.double() @ decoded, rtol=1e-5, atol=1e-2
    )


@pytest.mark.parametrize("name", EIGHT_BIT_FORMATS)
@pytest.mark.parametrize("num_tokens", [9, 16, 17])
def test_few_tokens_give_the_same_result_as_in_a_large_batch(name: str, num_tokens: int) -> None:
    """GPUs need at least 17 rows for int8."""
    weight, _ = stored(name, random(32, 64, seed=13))
    x, gradient = random(40, 64, seed=14), random(40, 32, seed=15)
    few, many = output(x[:num_tokens], weight, None), output(x, weight, None)[:num_tokens]
    torch.testing.assert_close(few, many, **FLOAT32_SAME_MATH)
    few, many = input_gradient(gradient[:num_tokens], weight), input_gradient(gradient, weight)[:num_tokens]
    torch.testing.assert_close(few, many, **FLOAT32_SAME_MATH)


def test_integer_kernels_are_given_enough_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = stored("int8", random(32, 64, seed=16))
    original, rows = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: rows.append(len(a)) or original(a, b))
    for num_tokens in (1, 16, 30):
        assert output(random(num_tokens, 64, seed=17), weight, None).shape == (num_tokens, 32)
    assert rows == [17, 17, 30]


@pytest.mark.parametrize("name", EIGHT_BIT_FORMATS)
def test_nan_and_inf_affect_only_their_token_and_zeros_give_the_bias(name: str) -> None:
    weight, _ = stored(name, random(32, 64, seed=18))
    x, bias = random(18, 64, seed=19), random(32, seed=20)
    x[3, 5], x[4, 6], x[5] = float("nan"), float("inf"), 0
    y = output(x, weight, bias)
    assert y[3].isnan().all() and not y[4].isfinite().any()
    assert torch.equal(y[5], bias)
    assert y[[i for i in range(18) if i not in (3, 4)]].isfinite().all()


def test_half_precision_does_not_overflow_before_the_factors_are_applied() -> None:
    weight, decoded = stored("fp8", 0.01 * random(32, 512, seed=21).abs())
    x = random(20, 512, seed=22).abs().half()
    y = output(x, weight, None)
    assert y.dtype == torch.float16 and relative_error(y, x.double() @ decoded.T) < 0.02


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        (torch.int8, (24, 40), True), (torch.int8, (24, 36), False), (torch.int8, (20, 40), False),
        (FP8, (32, 48), True), (FP8, (32, 40), False), (torch.float8_e5m2, (16, 16), True),
        (torch.uint8, (16, 16), False),
    ],
)  # fmt: skip
def test_shapes_that_gpu_kernels_support(kind: torch.dtype, shape: tuple[int, int], expected: bool) -> None:
    codes_OI = torch.zeros(shape, dtype=torch.uint8).view(kind)
    assert Codes(codes_OI, torch.ones(shape[0], 1)).can_be_multiplied is expected
    assert not Codes(codes_OI, torch.ones(shape[0], 2, 1)).can_be_multiplied


def test_codes_are_column_major_for_gpu_kernels() -> None:
    codes = make_exact_codes((8, 24), torch.int8, seed=23).to(torch.int8)
    assert columns_first(codes).stride() == (1, 8) and torch.equal(columns_first(codes), codes)


def test_formats_with_codes_are_those_that_the_option_accepts() -> None:
    def has_codes(codec: Codec) -> bool:
        return codec.codes(codec.encode(torch.ones(8, 64))) is not None

    assert tuple(name for name, codec in CODECS.items() if has_codes(codec)) == EIGHT_BIT_FORMATS


@pytest.mark.parametrize("name", EIGHT_BIT_FORMATS)
def test_layers_multiply_codes_and_still_expose_the_decoded_weight(name: str) -> None:
    torch.manual_seed(24)
    layers = [nn.Linear(64, 32), nn.Linear(64, 20), nn.Conv2d(16, 16, 3, padding=1)]
    decoded = [nn.Linear(64, 32), nn.Linear(64, 20), nn.Conv2d(16, 16, 3, padding=1)]
    freeze_layers(CODECS[name], layers)
    assert multiply_codes(layers) == 1  # type: ignore[arg-type]
    for layer, plain in zip(layers, decoded, strict=True):
        plain.requires_grad_(False)
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    for i, shape in enumerate([(4, 9, 64), (4, 9, 64), (2, 16, 5, 5)]):
        results = []
        for module in (layers[i], decoded[i]):
            x = random(*shape, seed=25).requires_grad_()
            y = module(x)
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
        for actual, expected in zip(*results, strict=True):
            error = relative_error(actual, expected.double())
            assert 0.001 < error < 0.05 if i == 0 else error < 1e-5


def test_the_backward_pass_reads_the_codes_again() -> None:
    """By then their memory may hold another layer's codes."""
    layer = nn.Linear(64, 32).requires_grad_(False)
    freeze_layer(CODECS["int8"], layer)
    multiply_codes([layer])  # type: ignore[list-item]
    requests: list[str] = []
    parts = layer.own_parts()  # type: ignore[operator]
    layer.handle = lambda: requests.append("") or parts  # type: ignore[func-returns-value, assignment]
    x = random(20, 64, seed=26).requires_grad_()
    y = layer(x)
    assert len(requests) == 1
    y.sum().backward()
    assert len(requests) == 2
