"""Compiled blocks: few graphs regardless of the number of blocks, and the gradients of uncompiled blocks."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory.blocks import Every, plain, recompute
from library.memory.codecs.plain import Plain
from library.memory.compiled import Compiled, CompiledBlock, CompileSettings
from library.memory.frozen import freeze_layers, frozen_layers, layers_in_blocks, multiply_codes
from library.memory.offload.streamed import stream
from library.memory.planner.counter import FlopCounter
from tests.parity.deep import DEEP
from tests.parity.modes import ALL_CODECS, RUNNERS, install_adapter
from tests.tolerances import EXACT, FLOAT32_SAME_MATH

CPU = torch.device("cpu")


class CountingBackend:
    """A backend that runs graphs unchanged and counts them."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(
    base: str, adapter: str = "lora", runner: str = "plain", form: str = "none", place: str = "device",
    settings: CompileSettings | None = None, is_multiplied: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return the loss and the gradients of all adapter parameters in the second of two equal steps."""
    deep = DEEP[base]
    model = deep.frozen(61)
    if (kind := ALL_CODECS[form]) is not None:
        freeze_layers(kind, layers_in_blocks(model).values())
    if is_multiplied:
        assert multiply_codes(frozen_layers(model)) > 4
    if place == "streamed":
        stacks = deep.stacks(model)
        freeze_layers(Plain(), (layer for stack in stacks for block in stack for layer in block.modules()))
        stream(stacks, [len(stack) - 2 for stack in stacks], CPU)
    blocks = RUNNERS[runner]()
    deep.run_blocks_with(model, blocks if settings is None else Compiled(blocks, settings))
    network = install_adapter(adapter, deep.seen(model))
    results: list[Tensor] = []
    for _ in range(2):
        for parameter in network.parameters():
            parameter.grad = None
        loss = deep.loss(model, CPU)
        loss.backward()
        results = [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]
    return results


CASES = [("flux", "lora", "plain", "int8")]
SLOW = [
    ("anima", "dora", "recompute", "none"),
    ("flux", "lora", "recompute", "none"),
    *((base, "lora", "recompute_every_2", "none") for base in DEEP if base != "flux"),
    *(("flux", adapter, "recompute", "none") for adapter in ("loha", "lokr", "oft_v2", "boft", "lora_fa", "dylora")),
    *(("sd3", "lora", "plain", form) for form in ("plain", "fp8", "nf4")),
    ("sd", "lycoris", "recompute", "none"),
    ("flux", "dora", "recompute_from_main_memory", "fp8"),
]


@pytest.mark.parametrize(
    ("base", "adapter", "runner", "form"), [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in SLOW)]
)
def test_gradients_equal_those_of_uncompiled_blocks_with_few_graphs(
    base: str, adapter: str, runner: str, form: str
) -> None:
    """Unchanged graphs give equal rounding, except for DoRA's norms, which sum columns in another order, and rotary
    embeddings, which are compiled as sums: with heads of 12 values as here, complex products differ in the last
    bit."""
    backend = CountingBackend()
    wanted = gradients(base, adapter, runner, form)
    actual = gradients(base, adapter, runner, form, settings=CompileSettings(backend, needs_full_graph=True))
    assert 0 < backend.num_graphs <= DEEP[base].most_graphs
    assert len(actual) == len(wanted) > 4
    for one, other in zip(actual, wanted, strict=True):
        is_close = adapter == "dora" or base == "lumina"
        torch.testing.assert_close(one, other, **(FLOAT32_SAME_MATH if is_close else EXACT))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("base", "form"),
    [("anima", "int8_rotated"), *(pytest.param(base, "fp8", marks=pytest.mark.nightly) for base in ("sd3", "sd"))],
)
def test_8_bit_matmul_is_compiled_with_its_block(base: str, form: str) -> None:
    """A U-Net's gradients differ in the last bit when compiled, and rounding them to 8 bits for the next product makes
    that 1 % (torch 2.13) to 3 % (2.15). Without 8-bit products they differ by 38 % and more."""
    backend = CountingBackend()
    wanted = gradients(base, runner="recompute", form=form, is_multiplied=True)
    settings = CompileSettings(backend, needs_full_graph=True)
    actual = gradients(base, runner="recompute", form=form, settings=settings, is_multiplied=True)
    assert 0 < backend.num_graphs <= DEEP[base].most_graphs
    for one, other in zip(actual, wanted, strict=True):
        assert torch.equal(one, other) or (base == "sd" and (one - other).norm() < 0.1 * other.norm())


@pytest.mark.nightly
def test_nf4_double_weights_are_dequantised_outside_the_compiled_parts() -> None:
    """bitsandbytes creates their code table in a way that cannot be compiled."""
    backend = CountingBackend()
    wanted = gradients("sd3", form="nf4_double")
    actual = gradients("sd3", form="nf4_double", settings=CompileSettings(backend))
    assert backend.num_graphs > 0
    for one, other in zip(actual, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.nightly
@pytest.mark.parametrize(("base", "adapter"), [("flux", "lora"), ("sd3", "dora"), ("sd", "lora")])
def test_inductor_gives_the_same_gradients(base: str, adapter: str) -> None:
    """In float32, sums in another order differ in the last digits."""
    wanted = gradients(base, adapter, "recompute")
    actual = gradients(base, adapter, "recompute", settings=CompileSettings("inductor"))
    for one, other in zip(actual, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-8


@pytest.mark.nightly
@pytest.mark.parametrize("runner", [pytest.param("recompute", marks=pytest.mark.nightly), "recompute_every_2"])
def test_swapping_is_not_compiled(runner: str) -> None:
    """Two blocks of each kind are not swapped."""
    backend = CountingBackend()
    wanted = gradients("anima", runner=runner, place="streamed")
    actual = gradients("anima", runner=runner, place="streamed", settings=CompileSettings(backend))
    assert 0 < backend.num_graphs <= DEEP["anima"].most_graphs
    for one, other in zip(actual, wanted, strict=True):
        assert torch.equal(one, other)


class Toy(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(8, 8)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return x_BTI + torch.tanh(self.layer(x_BTI))


def steps_with(settings: CompileSettings, sizes: list[int], runner: Any = plain) -> list[Tensor]:
    blocks, outputs = [Toy(seed) for seed in range(5)], []
    run = Compiled(runner, settings)
    for size in sizes:
        x = torch.randn(2, size, 8, generator=torch.Generator().manual_seed(size)).requires_grad_()
        y = x
        for block in blocks:
            y = run(block, y)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        outputs.append(gradient)
    return outputs


@pytest.mark.parametrize(("is_dynamic", "most"), [(True, 1), (False, 4)])
def test_new_sizes_are_compiled_as_configured(is_dynamic: bool, most: int) -> None:
    backend, sizes = CountingBackend(), [4, 7, 9, 12]
    actual = steps_with(CompileSettings(backend, is_dynamic=is_dynamic), sizes)
    assert backend.num_graphs == most
    for one, other in zip(actual, steps_with(CompileSettings("eager"), sizes), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("runner", [plain, recompute, Every(2, recompute)])
def test_sizes_beyond_the_limit_run_uncompiled_with_one_warning(runner: Any, caplog: pytest.LogCaptureFixture) -> None:
    backend, sizes = CountingBackend(), [4, 7, 9, 12]
    with caplog.at_level(logging.INFO):
        actual = steps_with(CompileSettings(backend, is_dynamic=False, most_graphs=2), sizes, runner)
    assert backend.num_graphs == 2
    assert caplog.text.count("compiling Toy; the first steps can take minutes") == 1
    assert caplog.text.count("Toy was compiled 2 times") == 1 and "(2, 9, 8)" in caplog.text
    for one, other in zip(actual, steps_with(CompileSettings("eager"), sizes), strict=True):
        assert torch.equal(one, other)


def test_passes_without_gradient_or_while_counting_are_not_compiled() -> None:
    """torch never compiles code that it first met while operations were counted."""
    backend = CountingBackend()
    block = CompiledBlock(Toy(3), CompileSettings(backend), set(), set())
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        block(x)
    with FlopCounter() as counter:
        block(x)
    assert backend.num_graphs == 0 and counter.flops == 2 * 10 * 8 * 8
    block(x)
    assert backend.num_graphs == 1


def test_layers_with_different_alphas_share_a_graph() -> None:
    """The alphas are Python numbers, not tensors."""
    from networks.core.changes.alpha import ScaledDelta
    from networks.core.changes.low_rank import LowRank

    class Adapted(nn.Module):
        def __init__(self, alpha: float) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.change = ScaledDelta(self.layer, LowRank(self.layer, 2), alpha)

        def forward(self, x: Tensor) -> Tensor:
            return self.change.forward(x, self.layer, 1.0)

    backend = CountingBackend()
    run = Compiled(plain, CompileSettings(backend))
    x = torch.randn(3, 8, requires_grad=True)
    for block in [Adapted(alpha) for alpha in (0.5, 1.5, 2.5, 3.0, 7.0)]:
        run(block, x)
    assert backend.num_graphs <= 2
