"""A step counted on fake tensors from two blocks of each kind matches the allocator's view of a complete real step."""

import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from library.memory.blocks import BlockRunner, plain, recompute
from library.memory.devices import tensors_of
from library.memory.planner.counter import OperationCounter
from library.memory.planner.fakes import NORMS, emulate_cuda_norms, give_fakes
from library.memory.planner.repeats import Repeats, shorten_runs
from library.memory.planner.steps import (
    CountedPass,
    DifferentInputs,
    Timeline,
    compute_peak_bytes,
    count_optimizer,
    count_pass,
    short_walk,
)
from library.training.planning.counted_step import count_some_blocks
from tests.unit.memory.planner.made_up import MadeUp, allocated_peak

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
WIDTH, NUM_BLOCKS, TOKENS, RANK = 96, 6, 160, 5
SHARE = 0.03  # tolerance for counting two of six blocks
ANSWERS = {"int": 1, "float": 0.5, "bool": True}
WAYS: dict[str, Callable[[int], bool]] = {
    "keeps all": lambda i: False,
    "recomputes all": lambda i: True,
    "recomputes every second": lambda i: i % 2 == 0,
    "recomputes every third": lambda i: i % 3 == 0,
}


def model_of(num_blocks: int = NUM_BLOCKS, device: str = "cpu") -> MadeUp:
    torch.manual_seed(91)
    with torch.device(device):
        model = MadeUp(WIDTH, num_blocks)
        model.adapt(RANK)
    return model


def loss_of(model: MadeUp, dtype: torch.dtype | None = None) -> Tensor:
    torch.manual_seed(92)
    x, conditioning = torch.randn(2, TOKENS, WIDTH), torch.randn(2, 8)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        return model(x, conditioning).float().square().mean()


def chosen(recomputes: Callable[[int], bool]) -> BlockRunner:
    """Return a runner that recomputes blocks by their position in the order of calls."""
    places: dict[nn.Module, int] = {}

    def run(block: nn.Module, *inputs: Any, **named: Any) -> Any:
        place = places.setdefault(block, len(places))
        return (recompute if recomputes(place) else plain)(block, *inputs, **named)

    return run


def counted(dtype: torch.dtype | None = None, num_passes: int = 1) -> Timeline:
    """Count the step of the whole model from two blocks of each kind."""
    model = model_of(device="meta")

    def give_runner(runner: BlockRunner) -> None:
        model.runner = runner

    with shorten_runs([model.attending, model.widening]) as repeats, FakeTensorMode(allow_non_fake_inputs=True):
        assert len(model.attending) == len(model.widening) == 2
        give_fakes(model)
        passes = []
        for runner in (plain, recompute):
            for parameter in model.parameters():
                parameter.grad = None
            counter = OperationCounter(ANSWERS)
            counter.leave_out(tensors_of(model))
            passes.append(count_pass(lambda: loss_of(model, dtype), give_runner, runner, counter, num_passes))
    assert len(model.attending) == NUM_BLOCKS, "the model is whole again"
    return Timeline.build(passes[0], passes[1], repeats)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_the_peak_of_a_step_matches_the_allocator(way: str, dtype: torch.dtype | None) -> None:
    model = model_of()
    model.runner = chosen(WAYS[way])
    real = allocated_peak(lambda: loss_of(model, dtype).backward(), multiplies_bf16=dtype is not None)
    planned = compute_peak_bytes(counted(dtype).expand(WAYS[way], lambda i: True))
    assert planned == pytest.approx(real, rel=SHARE)


@pytest.mark.parametrize("way", ["keeps all", "recomputes all"])
def test_existing_gradients_are_not_allocated_again(way: str) -> None:
    model = model_of()
    model.runner = chosen(WAYS[way])
    loss_of(model).backward()
    real = allocated_peak(lambda: loss_of(model).backward())
    assert compute_peak_bytes(counted(num_passes=2).expand(WAYS[way], lambda i: True)) == pytest.approx(real, rel=SHARE)


@pytest.mark.parametrize("way", WAYS)
def test_operations_match_torchs_own_counter(way: str) -> None:
    model = model_of()
    model.runner = chosen(WAYS[way])
    with FlopCounterMode(display=False) as counter:
        loss_of(model).backward()
    # Before torch 2.15 its counter lacks the CPU's attention: 2 products forward, 5 backward, 2 operations a term.
    lacks_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry
    forward = 2 * 2 * 2 * TOKENS**2 * WIDTH if lacks_attention else 0
    num_recomputed = sum(WAYS[way](place) for place in range(NUM_BLOCKS))
    attention = NUM_BLOCKS * (forward + forward * 5 // 2) + num_recomputed * forward
    planned = sum(move.segment.flops for move in counted().expand(WAYS[way], lambda i: True))
    assert planned == counter.get_total_flops() + attention


def test_kernels_and_their_memory_traffic_are_counted() -> None:
    """Views and uninitialised tensors launch no kernel."""
    counter = OperationCounter(ANSWERS)
    x, y = torch.ones(8, 4), torch.ones(4, 2)
    with counter:
        out = (x @ y).t().add(1)
        torch.empty(100)
        out.t().view(-1).detach()
        counter.cut()
    (segment,) = counter.segments
    assert segment.launches == 2
    assert segment.moved == 4 * (32 + 8 + 16) + 4 * (16 + 16)
    assert segment.flops == 2 * 8 * 4 * 2


def test_offloaded_inputs_leave_and_come_back() -> None:
    timeline = counted()
    with_inputs = compute_peak_bytes(timeline.expand(lambda i: True, lambda i: True))
    without_inputs = compute_peak_bytes(timeline.expand(lambda i: True, lambda i: False))
    sizes = 2 * TOKENS * WIDTH * 4
    # The input of the first block has no gradient and stays. The peak is reached in the last block of the second kind:
    # by then the other inputs of the first kind are offloaded, and those of the second kind except its own.
    assert with_inputs - without_inputs == pytest.approx(5 * sizes + 5 * 2 * sizes, rel=0.1)


def test_blocks_with_different_adapters_are_counted_separately() -> None:
    model = model_of(device="meta")
    torch.manual_seed(93)
    with torch.device("meta"):
        layer = model.widening[3].up
        del layer.__dict__["forward"]
        model.adapters.append(type(model.adapters[0])(layer, RANK + 1))
    with shorten_runs([model.attending, model.widening], shares=False) as repeats:
        assert len(model.attending) == 2
        assert [len(repeats.represented[block]) for block in model.widening] == [1, 2, 1, 1, 1]


def three_stacks() -> tuple[MadeUp, list[nn.ModuleList]]:
    """Return a model whose attention blocks form three stacks in the order of calls."""
    model = model_of(device="meta")
    blocks = list(model.attending)
    return model, [nn.ModuleList(blocks[:2]), nn.ModuleList(blocks[2:5]), nn.ModuleList(blocks[5:])]


def count_stacks(shares: bool) -> Timeline:
    model, stacks = three_stacks()

    def give_runner(runner: BlockRunner) -> None:
        model.runner = runner

    with shorten_runs([*stacks, model.widening], shares) as repeats, FakeTensorMode(allow_non_fake_inputs=True):
        model.attending = nn.ModuleList(block for stack in stacks for block in stack)
        assert len(model.attending) == (4 if shares else 5)
        give_fakes(model)
        passes = []
        for runner in (plain, recompute):
            for parameter in model.parameters():
                parameter.grad = None
            counter = OperationCounter(ANSWERS)
            counter.leave_out(tensors_of(model))
            passes.append(count_pass(lambda: loss_of(model), give_runner, runner, counter))
        return Timeline.build(passes[0], passes[1], repeats)


@pytest.mark.parametrize("way", WAYS)
def test_one_block_of_a_stack_suffices_if_another_stack_is_alike(way: str) -> None:
    few, more = (count_stacks(shares) for shares in (True, False))
    assert len(few.blocks) == len(more.blocks) == 2 * NUM_BLOCKS
    for keeps_inputs in (lambda i: True, lambda i: False):
        actual, expected = (list(timeline.expand(WAYS[way], keeps_inputs)) for timeline in (few, more))
        assert compute_peak_bytes(actual) == compute_peak_bytes(expected)
        for value in ("flops", "moved", "launches"):
            totals = [sum(getattr(move.segment, value) for move in moves) for moves in (actual, expected)]
            assert totals[0] == totals[1]


def test_a_block_does_not_represent_blocks_with_other_inputs() -> None:
    first, earlier, other, last = (nn.Identity() for _ in range(4))
    shapes = ((torch.Size((4,)),), (torch.Size((4,)),), (torch.Size((8,)),))
    counted = CountedPass((), (first, earlier, other), (1, 1, 1), shapes)
    repeats = Repeats({}, {other: (earlier, [last])})
    with pytest.raises(DifferentInputs):
        Timeline.build(counted, counted, repeats)
    alike = replace(counted, input_shapes=shapes[:2] * 2)
    timeline = Timeline.build(alike, alike, repeats)
    assert timeline.blocks == (first, earlier, other, last) and timeline.representatives == (0, 1, 2, 1)


def test_without_equal_inputs_two_blocks_of_each_stack_are_counted() -> None:
    block_counts: list[int] = []

    def count(repeats: Repeats) -> Timeline:
        block_counts.append(len(repeats.by_earlier_run))
        if repeats.by_earlier_run:
            raise DifferentInputs
        return Timeline(NOTHING, NOTHING, (), (), ())

    count_some_blocks(three_stacks()[1], count)
    assert block_counts == [1, 0]


NOTHING = CountedPass((), (), ())


def test_an_optimizer_is_counted_separately() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        groups = [{"params": [nn.Parameter(torch.empty(64, 48)) for _ in range(5)]}]
        actual = count_optimizer(lambda params: torch.optim.AdamW(params, lr=1e-3), groups, OperationCounter(ANSWERS))
    assert actual.state == pytest.approx(8 * 5 * 64 * 48, rel=0.01)
    assert actual.rise >= actual.state


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_an_optimizer_is_counted_equally_from_a_subset_of_parameters(
    kind: str, num_groups: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameter kinds in a random order, then repeated as in blocks."""
    rng = random.Random(seed)
    kinds = [(rng.randrange(1, 300), rng.randrange(1, 300)) for _ in range(5)]
    order = [rng.choice(kinds) for _ in range(9)] + 6 * rng.choices(kinds, k=5) + [rng.choice(kinds) for _ in range(4)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [nn.Parameter(torch.empty(size)) for size in order]
        groups = [{"params": parameters[place::num_groups]} for place in range(num_groups)]
        options = {"momentum": 0.9} if kind == "SGD" else {"amsgrad": seed == 1, "weight_decay": 0.1}
        counts = []
        for is_short in (True, False):
            if not is_short:
                monkeypatch.setattr("library.memory.planner.steps.has_state_first", lambda optimizer: False)
            build = lambda params: getattr(torch.optim, kind)(params, lr=1e-3, **options)  # noqa: E731
            counts.append(count_optimizer(build, groups, OperationCounter(ANSWERS)))
    assert counts[0] == counts[1]
    assert counts[0].state > 0
    assert (len(short_walk(parameters)) < len(parameters) - 15) and short_walk(parameters)[0] is parameters[0]


def test_norms_can_be_counted_as_a_gpu_computes_them() -> None:
    norm = nn.LayerNorm(8)
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
        with emulate_cuda_norms():
            full = norm(x.bfloat16())
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert norm(x.bfloat16().float()).dtype == torch.float32, "the rule ends with the block"


def test_models_look_norms_up_where_the_planner_replaces_them() -> None:
    bound = re.compile(rf"^from torch.nn.functional import .*\b({'|'.join(NORMS)})\b", re.MULTILINE)
    files = [file for folder in ("models", "architectures") for file in (ROOT / "library" / folder).rglob("*.py")]
    assert files and not [file for file in files if bound.search(file.read_text(encoding="utf-8"))]


def test_an_rms_norm_is_counted_as_the_one_kernel_that_cuda_has() -> None:
    norm, counter = nn.RMSNorm(64).requires_grad_(False), OperationCounter(ANSWERS)
    with FakeTensorMode(), emulate_cuda_norms(), torch.autocast("cpu", torch.bfloat16), counter:
        give_fakes(norm)
        x = torch.empty(2, 64, requires_grad=True)
        before = counter.launches
        y = norm(x)
        assert counter.launches - before == 1
        y.backward(torch.empty_like(y))
    assert counter.launches - before == 2, "one more for the input's gradient"
    assert counter.moved > 2 * 2 * 64 * 4
