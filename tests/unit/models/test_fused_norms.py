"""Fused operations and rotary embeddings agree with float64."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from library.architectures.moss_image.model import situ, situ_halves
from library.architectures.qwen_image_21 import model as qwen_image
from library.base.determinism import deterministic_mode
from library.base.errors import UserError
from library.memory import fused_kernels as fused
from library.memory.compiled_calls import CompiledCalls
from library.memory.fused_kernels import (
    Fused,
    compiles_bf16,
    compiles_for,
    count_fused,
    fused_operations,
    has_compiler,
    try_compiler,
)
from library.memory.planner.counter import FlopCounter, OperationCounter
from library.memory.planner.known import load_models
from library.models import rotary
from library.models.double_stream import DoubleStreamBlock, Modulation, SingleStreamBlock, StreamConfig
from library.models.fused_norms import (
    gated_norm_sum,
    gated_sum,
    modulated_norm,
    modulated_rms_norm,
    parted_norm,
    parted_sum,
    rotated_norm,
    rotated_norm_of_halves,
    scaled_norm,
    shifted_norm,
    sigmoid_product,
    silu_product,
    swiglu,
)
from library.models.next_dit import JointTransformerBlock, NextDiTConfig
from library.models.rotary import Rotary, apply_rope
from tests.tolerances import FLOAT32_SAME_MATH

N, D, M = 4, 16, 256
rotate, rotate_halves = rotated_norm(1e-6), rotated_norm_of_halves(1e-6)
rms_norm = modulated_rms_norm(1e-6)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """An operation, the shapes of its inputs for B samples of T tokens, and the inputs whose gradients are wanted."""

    operation: Fused
    shapes: Callable[[int, int], Sequence[tuple[int, ...] | None]]
    wanted: tuple[int, ...]

    def inputs(self, num_tokens: int, dtype: torch.dtype, num_samples: int = 2) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(5)
        inputs = [
            None if shape is None else torch.randn(shape, generator=generator).to(dtype)
            for shape in self.shapes(num_samples, num_tokens)
        ]
        if self.operation in (
            rotate,
            rotate_halves,
        ):  # queries are a view of a layer's output, of which the rope covers some tokens
            layer = torch.randn(num_samples, num_tokens, 3 * N * D, generator=generator).to(dtype)
            inputs[0] = layer.chunk(3, dim=-1)[1].unflatten(-1, (N, D)).transpose(1, 2)
            positions = torch.randint(0, 9, (num_tokens + 3, 2), generator=generator)
            inputs[2] = Rotary((D // 2, D // 2))(positions, (9, 9))[3:]
        return [
            x if x is None else x.requires_grad_(i in self.wanted)
            for i, x in enumerate(x if x is None else x.detach() for x in inputs)
        ]


CASES = {
    "modulated norm": Case(modulated_norm, lambda B, T: [(B, T, M), (B, 1, M), (B, 1, M)], (0,)),
    "modulated norm, adapted": Case(modulated_norm, lambda B, T: [(B, T, M), (B, 1, M), (B, 1, M)], (0, 1, 2)),
    "modulation alone": Case(modulated_norm, lambda B, T: [(B, T, M), (B, 1, M), (B, 1, M)], (1, 2)),
    "norm without shift": Case(modulated_norm, lambda B, T: [(B, T, M), None, (B, 1, M)], (0, 2)),
    "scaled norm": Case(scaled_norm, lambda B, T: [(B, T, M), (M,), (B, 1, M)], (0,)),
    "scaled norm, adapted": Case(scaled_norm, lambda B, T: [(B, T, M), (M,), (B, 1, M)], (0, 1, 2)),
    "norm without scale": Case(scaled_norm, lambda B, T: [(B, T, M), (M,), None], (0,)),
    "shifted norm": Case(shifted_norm, lambda B, T: [(B, T, M), (M,), (B, 1, M), (B, 1, M)], (0,)),
    "shifted norm, adapted": Case(shifted_norm, lambda B, T: [(B, T, M), (M,), (B, 1, M), (B, 1, M)], (0, 1, 2, 3)),
    "shifted norm alone": Case(shifted_norm, lambda B, T: [(B, T, M), (M,), None, None], (0,)),
    "RMS norm": Case(rms_norm, lambda B, T: [(B, T, M), (M,), (B, 1, M), (B, 1, M)], (0,)),
    "RMS norm, adapted": Case(rms_norm, lambda B, T: [(B, T, M), (M,), (B, 1, M), (B, 1, M)], (0, 1, 2, 3)),
    "gated sum": Case(gated_sum, lambda B, T: [(B, T, M), (B, 1, M), (B, T, M)], (0, 2)),
    "gated sum, adapted": Case(gated_sum, lambda B, T: [(B, T, M), (B, 1, M), (B, T, M)], (0, 1, 2)),
    "first gated sum": Case(gated_sum, lambda B, T: [(B, T, M), (B, 1, M), (B, T, M)], (1, 2)),
    "norm of two parts": Case(parted_norm, lambda B, T: [(B, T, M), (B, 1, M), (B, 1, M), (T, 1)], (0,)),
    "norm of two parts, adapted": Case(parted_norm, lambda B, T: [(B, T, M), (B, 1, M), (B, 1, M), (T, 1)], (0, 1, 2)),
    "gated sum of two parts": Case(
        parted_sum, lambda B, T: [(B, T, M), (B, 1, M), (B, 1, M), (B, T, M), (T, 1)], (0, 3)
    ),
    "gated sum of two parts, adapted": Case(
        parted_sum, lambda B, T: [(B, T, M), (B, 1, M), (B, 1, M), (B, T, M), (T, 1)], (0, 1, 2, 3)
    ),
    "gated norm": Case(gated_norm_sum, lambda B, T: [(B, T, M), (B, 1, M), (B, T, M), (M,)], (0, 2)),
    "gated norm, adapted": Case(gated_norm_sum, lambda B, T: [(B, T, M), (B, 1, M), (B, T, M), (M,)], (0, 1, 2, 3)),
    "norm without gate": Case(gated_norm_sum, lambda B, T: [(B, T, M), None, (B, T, M), (M,)], (0, 2)),
    "rotated norm": Case(rotate, lambda B, T: [(1,), (D,), (1,)], (0,)),
    "rotated norm, adapted": Case(rotate, lambda B, T: [(1,), (D,), (1,)], (0, 1)),
    "rotated norm of halves": Case(rotate_halves, lambda B, T: [(1,), (D,), (1,)], (0,)),
    "sigmoid product": Case(sigmoid_product, lambda B, T: [(B, T, M), (B, T, M)], (0, 1)),
    "SiLU product": Case(silu_product, lambda B, T: [(B, T, M), (B, T, M)], (0, 1)),
    "SiTU": Case(situ, lambda B, T: [(B, T, M), (B, T, M)], (0, 1)),
    "SiTU of halves": Case(situ_halves, lambda B, T: [(B, T, 2 * M)], (0,)),
    "SwiGLU": Case(swiglu, lambda B, T: [(B, T, 2 * M)], (0,)),
}

RARE = ("modulation alone", "rotated norm, adapted")  # at most once in a step, or never: not counted exactly


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile fused operations for the CPU."""
    torch.compiler.reset()
    for case in CASES.values():
        case.operation.compiled.clear()
    monkeypatch.setattr(fused, "compiles_for", lambda device: True)
    yield
    torch.compiler.reset()


def num_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def results(operation: Callable[..., Tensor], case: Case, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    out = operation(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, [inputs[i] for i in case.wanted], weights)]  # type: ignore[misc]


def in_float64(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("name", CASES)
def test_compiled_forms_agree_with_float64_and_are_compiled_once_for_all_sizes(name: str) -> None:
    case = CASES[name]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        for num_tokens in (50, 33, 70):
            inputs = case.inputs(num_tokens, dtype)
            expected = results(case.operation.expression, case, in_float64(inputs))
            actual = results(case.operation, case, inputs)
            for ours, wanted in zip(actual, expected, strict=True):
                assert ours.dtype == dtype
                scale = wanted.abs().max()
                torch.testing.assert_close(ours.double() / scale, wanted / scale, rtol=tolerance, atol=tolerance)
            if num_tokens == 50:
                known = num_graphs()
            assert num_graphs() == known > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_a_call_like_an_earlier_one_skips_the_compilers_checks_and_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[object] = []
    run_checked = CompiledCalls.run_checked
    monkeypatch.setattr(CompiledCalls, "run_checked", lambda *values: (checked.append(values), run_checked(*values))[1])
    for name in ("modulated norm, adapted", "norm without scale", "gated sum"):
        case = CASES[name]
        for inputs in (
            case.inputs(50, torch.bfloat16),
            case.inputs(33, torch.bfloat16),
            case.inputs(33, torch.float32),
        ):
            checked.clear()
            first = results(case.operation, case, inputs)
            assert len(checked) == 2
            for autocast in (False, True):  # which the graphs do not depend on, but a call might
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    again = results(case.operation, case, inputs)
                assert all(torch.equal(ours, wanted) for ours, wanted in zip(again, first, strict=True))
            spread = [x if x is None else strided(x) for x in inputs]  # other strides: another call
            other = results(case.operation, case, spread)
            torch.testing.assert_close(other, first, rtol=2**-8, atol=2**-8)
            assert len(checked) > 3


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_a_call_with_one_tensor_twice_is_not_taken_for_one_with_two() -> None:
    x, first, second = torch.randn(2, 9, M), torch.randn(2, 1, M), torch.randn(2, 1, M)
    for values in ((x, first, first), (x, first, second), (x, second, second)):
        torch.testing.assert_close(modulated_norm(*values), modulated_norm.expression(*values), rtol=1e-5, atol=1e-6)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1).detach()[..., 0].requires_grad_(x.requires_grad)


@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("operation", [rotate, rotate_halves], ids=["neighbours", "halves"])
def test_a_rotated_norm_is_a_norm_and_a_rotation(operation: Fused, is_strided: bool) -> None:
    x, weight, rope = (
        tensor.detach() for tensor in CASES["rotated norm"].inputs(20, torch.float32) if tensor is not None
    )
    x = x if is_strided else x.contiguous()
    normal = functional.rms_norm(x.double(), (D,), weight.double(), eps=1e-6).float()
    if operation is rotate:
        expected = apply_rope(normal, rope)
    else:  # in the other order, and back
        expected = apply_rope(normal.unflatten(-1, (2, -1)).mT.flatten(-2), rope).unflatten(-1, (-1, 2)).mT.flatten(-2)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(operation.expression(x, weight, rope), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("num_tokens", [40, 96])
@pytest.mark.parametrize("name", [name for name in CASES if name not in RARE])
def test_kernels_and_bytes_are_those_that_inductor_reports(
    name: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import compile_fx, config, metrics

    case = CASES[name]
    inputs = case.inputs(num_tokens, torch.bfloat16, num_samples=1)  # for several, the C++ backend fuses less
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda level: True)
    metrics.reset()
    with config.patch(force_disable_caches=True):
        out = case.operation(*inputs)
        torch.autograd.grad(out, [inputs[i] for i in case.wanted], torch.ones_like(out))
    compiled = sum(num_elements > 0 for _, num_elements in metrics.nodes_num_elem), metrics.num_bytes_accessed

    mode, counter = FakeTensorMode(), OperationCounter()
    fakes = [x if x is None else mode.from_tensor(x) for x in inputs]
    ones = mode.from_tensor(torch.ones_like(out))
    with mode, count_fused(), counter:
        torch.autograd.grad(case.operation(*fakes), [fakes[i] for i in case.wanted], ones)
    assert counter.launches == compiled[0]
    assert counter.moved == pytest.approx(compiled[1], rel=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_blocks_of_compiled_operations_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when recomputed, with saved tensors in other memory, and while products are counted."""
    expected = block_gradients(lambda block, *inputs: block(*inputs), monkeypatch, compiles=lambda device: False)

    def offloaded(block: nn.Module, *inputs: object) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return block(*inputs)  # type: ignore[no-any-return]

    def counted(block: nn.Module, *inputs: object) -> Tensor:
        with FlopCounter():
            return block(*inputs)  # type: ignore[no-any-return]

    calls = []
    run_compiled = Fused.run_compiled
    monkeypatch.setattr(Fused, "run_compiled", lambda *values: (calls.append(values), run_compiled(*values))[1])
    for run in (lambda block, *inputs: block(*inputs), recomputed, offloaded, counted):
        calls.clear()
        actual = block_gradients(run, monkeypatch, compiles=lambda device: True)
        num_compiled = num_graphs()
        block_gradients(run, monkeypatch, compiles=lambda device: True)
        assert calls and 0 < num_compiled == num_graphs()
        for ours, wanted in zip(actual, expected, strict=True):
            assert (ours - wanted).norm() <= 1e-6 * wanted.norm()


def block_gradients(
    run: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, compiles: Callable[[torch.device], bool]
) -> list[Tensor]:
    """Return the outputs and all gradients of a double, a single and a NextDiT block in float32."""
    monkeypatch.setattr(fused, "compiles_for", compiles)
    torch.manual_seed(7)
    config = StreamConfig(4, N * D, D, 96, 8, 1, 1, False)
    double = DoubleStreamBlock(config, lambda parts, row: Modulation(N * D, parts))
    single = SingleStreamBlock(config, lambda parts, row: Modulation(N * D, parts))
    sizes = dict.fromkeys(("text_width", "time_hidden", "num_context_refiners", "num_noise_refiners", "num_layers"), 1)
    joint_config = NextDiTConfig(4, N * D, D, 2, 96, time_width=8, **sizes)
    joint = JointTransformerBlock(joint_config, nn.Sequential(nn.Linear(8, 4 * N * D)))
    rope = Rotary((D,))(torch.arange(26)[:, None], (26,))
    img, txt, vec, time = (torch.randn(2, *shape) for shape in ((17, N * D), (9, N * D), (N * D,), (8,)))
    img.requires_grad_()
    img_out, txt_out = run(double, img, txt, vec, rope, None)
    out = run(joint, run(single, torch.cat([txt_out, img_out], dim=1), vec, rope, None), time, rope, None)
    parameters = [p for block in (double, single, joint) for p in block.parameters()]
    return [out.detach(), *torch.autograd.grad(out.square().mean(), [img, *parameters])]


def fail_to_compile(function: Callable[..., Tensor], **settings: bool) -> Callable[..., Tensor]:
    """Fail as torch.compile does without a C compiler."""
    from torch._inductor.exc import InductorError

    def run(*arguments: object) -> Tensor:
        raise InductorError(RuntimeError("no C compiler"), None)

    return run


def recomputed(block: nn.Module, *inputs: object) -> Tensor:
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return out


@pytest.mark.parametrize("has_triton", [True, False])
def test_a_compiler_that_fails_its_trial_is_named_once_and_not_used(
    has_triton: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recomputed step then equals a plain one."""
    import_module("torch._dynamo.utils")  # binds has_triton, which is replaced here
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: has_triton)
    monkeypatch.setattr(torch, "compile", fail_to_compile)
    monkeypatch.setattr(fused, "try_compiler", lambda device: try_compiler(CPU))
    decided = cache(has_compiler.__wrapped__)
    expected = block_gradients(lambda block, *inputs: block(*inputs), monkeypatch, compiles=lambda device: False)
    with caplog.at_level(logging.INFO, fused.__name__):
        actual = block_gradients(recomputed, monkeypatch, compiles=lambda device: decided(0))
    reason = "the compiler failed (RuntimeError: no C compiler)" if has_triton else "no working Triton"
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(f"slower: {reason}")
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_a_trial_compiles_both_directions_and_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    known = num_graphs()
    with caplog.at_level(logging.INFO, fused.__name__), FakeTensorMode():  # as while a plan is counted
        assert try_compiler(CPU) is None
    assert num_graphs() == known + 2
    assert re.search(r"a trial took \d+\.\d s, (from the compiler's cache|not cached yet)", caplog.text)


@pytest.mark.usefixtures("compiling")
def test_a_compiler_that_fails_after_its_trial_ends_the_run_with_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fail_to_compile)
    with pytest.raises(UserError, match=r"no C compiler.*--no_fused_operations"):
        Fused(torch.mul, {0: (1,), 1: (0,)})(torch.ones(3), torch.ones(3))


def test_fused_operations_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "has_compiler", lambda index: True)
    device = torch.device("cuda", 0)
    with fused_operations(are_off=True):
        assert not compiles_for(device)
    assert compiles_for(device)


@pytest.mark.parametrize(("capability", "is_fused"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bf16_is_fused_from_ampere_on(
    capability: tuple[int, int], is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compiles_bf16.__wrapped__(torch.device("cuda", 0)) == is_fused


@pytest.mark.usefixtures("compiling")
def test_errors_of_the_operation_itself_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Callable[..., Tensor], **settings: bool) -> Callable[..., Tensor]:
        def run(*arguments: object) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Fused(lambda x: x * 2, {0: ()})(torch.ones(3))


def test_nothing_is_compiled_on_the_cpu_or_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "has_compiler", lambda index: True)
    device = torch.device("cuda", 0)
    assert compiles_for(device) and not compiles_for(CPU)
    with deterministic_mode(True):
        assert not compiles_for(device)


@pytest.mark.usefixtures("compiling")
def test_fake_tensors_are_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *arguments, **named: pytest.fail("compiled"))
    with FakeTensorMode():
        x = torch.ones(2, 3, 8, requires_grad=True)
        operation = Fused(swiglu.expression, swiglu.reads)
        assert torch.autograd.grad(operation(x).sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(
    ("title", "most_gigabytes", "most_kernels"),
    [("FLUX.1", 450, 7000), ("Z-Image", 300, 4000), ("FLUX.2 klein 4B", 220, 3000)],
)
def test_a_step_of_a_full_size_model_is_counted_below_its_limit(
    title: str, most_gigabytes: float, most_kernels: int
) -> None:
    (model,) = (model for model in load_models() if model.title == title)
    (mode,) = (mode for mode in model.modes if not mode.options)
    work = mode.forward + mode.backward
    assert work.moved <= most_gigabytes * 1e9 and work.launches <= most_kernels


def test_a_block_of_moss_image_moves_about_as_much_per_token_as_one_of_klein() -> None:
    models = {model.title: model for model in load_models()}

    def megabytes(title: str, num_blocks: int, num_tokens: int) -> float:
        (mode,) = (mode for mode in models[title].modes if mode.options == "--gradient_checkpointing")
        return (mode.forward + mode.backward).moved / num_blocks / num_tokens / 1e6

    assert megabytes("FLUX.2 klein 4B", 25, 64**2 + 512) < 1.9
    assert megabytes("MOSS-Image", 42, 64**2 + 300) < 2.0
    assert megabytes("Qwen-Image 2.1", 32, 64**2 + 300) < 2.8  # a third wider than klein


def test_a_fused_block_of_qwen_image_is_the_block_that_runs_its_parts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, T, num_clean = torch.Generator().manual_seed(32), 12, 5
    config = qwen_image.QwenImage21Config(16, 64, 32, 96, 24, 1)
    block = qwen_image.QwenImageTransformerBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    x, rows = (torch.randn(2, *shape, generator=generator) for shape in ((T, 64), (2, 4 * 64)))
    rope = Rotary((4, 14, 14))(torch.randint(0, 9, (T, 3), generator=generator), (9, 9, 9))
    is_noisy_T1 = torch.arange(T)[:, None] >= num_clean
    results = []
    for is_fused in (False, True):
        monkeypatch.setattr(qwen_image, "fuses", lambda x, is_fused=is_fused: is_fused)
        leaves = [values.clone().requires_grad_() for values in (x, rows)]
        y = block(*leaves, rope, ((0, num_clean, True),), None, is_noisy_T1)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for parts, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, **FLOAT32_SAME_MATH)
    assert not torch.equal(rows[:, 0], rows[:, 1])


# Rotary position embedding: complex and real arithmetic give the same rotation.


@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_and_real_arithmetic_both_rotate_by_the_angles(
    dtype: torch.dtype, is_strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(31)
    positions = torch.randint(0, 9, (7, 2), generator=generator)
    rope = Rotary((16, 16))(positions, (9, 9))
    x = torch.randn(2, 7, 3, 32, generator=generator).to(dtype)
    x = x.transpose(1, 2) if is_strided else x.transpose(1, 2).contiguous()
    angles = torch.cat([positions[:, a, None] * 10_000.0 ** -(torch.arange(0, 16, 2).double() / 16) for a in (0, 1)], 1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    weights = torch.randn(2, 3, 7, 32, generator=generator)
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(rotary, "HAVE_COMPLEX", devices)
        leaf = x.detach().clone().requires_grad_()
        y = apply_rope(leaf, rope)
        assert y.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        results.append((y, torch.autograd.grad((y.float() * weights).sum(), leaf)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_table_of_an_axis_is_built_once_per_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], rotary.axis_table

    def record_call(width: int, extent: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((width, extent))
        return original(width, extent, base)

    monkeypatch.setattr(rotary, "axis_table", record_call)
    rotary_embedding, generator = Rotary((4, 8)), torch.Generator().manual_seed(32)
    results = []
    for extents in ((5, 6), (6, 5), (5, 6)):
        positions = torch.stack([torch.randint(0, extent, (7,), generator=generator) for extent in extents], -1)
        results.append((positions, rotary_embedding(positions, extents)))
    assert sorted(calls) == [(4, 5), (4, 6), (8, 5), (8, 6)]
    for positions, rope in results:
        torch.testing.assert_close(rope, Rotary((4, 8))(positions, (6, 6)), rtol=0, atol=0)
