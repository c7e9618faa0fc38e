"""Counting of one training step block by block, and its replay for the whole model in any memory mode."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.memory.blocks import BlockBody, BlockRunner
from library.memory.planner.counter import OperationCounter, Segment, bytes_touched
from library.memory.planner.repeats import Repeats

FORWARD, BACKWARD = "forward", "backward"


class MarkedRunner:
    """A runner that cuts the count where a block ends and where its backward pass begins.

    Another runner runs the blocks. A block's forward segment begins where the previous block ends. Work between two
    blocks, such as freeing the input, belongs to the second.
    """

    def __init__(self, runner: BlockRunner, counter: OperationCounter) -> None:
        self.blocks: list[nn.Module] = []  # in the order of their first call
        self.input_bytes: list[int] = []  # by block number: of inputs with gradients that are new
        self.input_shapes: list[tuple[torch.Size, ...]] = []  # by block number
        self._runner, self._counter = runner, counter
        self._seen: set[int] = set()
        self._backward: tuple[str, int] | None = None

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        body = block.block if isinstance(block, BlockBody) else block
        if body not in self.blocks:
            self.blocks.append(body)
            self.input_bytes.append(self._new_bytes((inputs, named)))
            self.input_shapes.append(tuple(t.shape for t in tree_leaves((inputs, named)) if is_tensor(t)))
        number = self.blocks.index(body)
        outputs = self._runner(block, *inputs, **named)
        self._counter.cut((FORWARD, number))
        self._mark_backward(outputs, number)
        return outputs

    def finish_pass(self) -> None:
        """End the last segment of a backward pass."""
        self._counter.cut(self._backward)
        self._backward = None

    def _new_bytes(self, inputs: Any) -> int:
        tensors = [t for t in tree_leaves(inputs) if is_tensor(t) and t.requires_grad]
        # Blocks pass tensors and views of them on; their memory counts for the first block that gets it.
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        new_sizes = [storage.nbytes() for key, storage in storages.items() if key not in self._seen]
        self._seen |= set(storages)
        return sum(new_sizes)

    def _mark_backward(self, outputs: Any, number: int) -> None:
        begun: list[bool] = []

        def begin(_: Tensor) -> None:
            if not begun:  # with several outputs, the first gradient counts
                begun.append(True)
                self._counter.cut(self._backward)
                self._backward = BACKWARD, number

        for tensor in tree_leaves(outputs):
            if is_tensor(tensor) and tensor.requires_grad:
                tensor.register_hook(begin)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@dataclass(frozen=True)
class CountedPass:
    """The counted forward and backward pass of one step. Blocks are numbered in the order of their calls."""

    segments: tuple[Segment, ...]
    blocks: tuple[nn.Module, ...]
    input_bytes: tuple[int, ...]
    input_shapes: tuple[tuple[torch.Size, ...], ...] = ()


def count_pass(
    loss: Callable[[], Tensor],
    give_runner: Callable[[BlockRunner], None],
    runner: BlockRunner,
    counter: OperationCounter,
    num_passes: int = 1,
) -> CountedPass:
    """Count the last of `num_passes` passes, with the gradients of the earlier ones, as in gradient accumulation.

    `loss` computes a scalar with the model, whose blocks run through the runner passed to `give_runner`.
    """
    for _ in range(num_passes):
        marked = MarkedRunner(runner, counter)
        give_runner(marked)
        counter.restart()
        with counter:
            value = loss()
            torch.autograd.backward(value)
            del value
        marked.finish_pass()
    return CountedPass(
        tuple(counter.segments), tuple(marked.blocks), tuple(marked.input_bytes), tuple(marked.input_shapes)
    )


@dataclass(frozen=True)
class StepSegment:
    """A segment of the whole model's step. `block_index` counts the model's blocks; None outside of blocks."""

    segment: Segment
    is_backward: bool
    block_index: int | None


class DifferentInputs(Exception):
    """Error for blocks with the same structure but inputs of different sizes, so that none can represent the others."""


@dataclass(frozen=True)
class Timeline:
    """A counted step of the whole model, with each block both plain and recomputed."""

    plain: CountedPass
    recomputed: CountedPass
    blocks: tuple[nn.Module, ...]  # of the whole model
    block_indices: tuple[range, ...]  # by number of a counted block: the blocks that run when it runs
    representatives: tuple[int, ...]  # by block: the number of the counted block for it

    @classmethod
    def build(cls, plain: CountedPass, recomputed: CountedPass, repeats: Repeats) -> "Timeline":
        """Expand a counted step. Raises DifferentInputs if a block cannot represent those of another run."""
        assert [s.label for s in plain.segments] == [s.label for s in recomputed.segments], "the passes differ"
        blocks: list[nn.Module] = []
        block_indices, representatives = [], []
        for number, block in enumerate(plain.blocks):
            first = len(blocks)
            represented = repeats.represented.get(block, [block])
            blocks += represented
            representatives += [number] * len(represented)
            if block in repeats.by_earlier_run:
                earlier, others = repeats.by_earlier_run[block]
                representative = plain.blocks.index(earlier)
                if plain.input_shapes[representative] != plain.input_shapes[number]:
                    raise DifferentInputs
                blocks += others
                representatives += [representative] * len(others)
            block_indices.append(range(first, len(blocks)))
        return cls(plain, recomputed, tuple(blocks), tuple(block_indices), tuple(representatives))

    @cached_property
    def by_label(self) -> Mapping[tuple[str, int], tuple[Segment, Segment]]:
        """The plain and the recomputed segment of each pass of each counted block."""
        pairs = zip(self.plain.segments, self.recomputed.segments, strict=True)
        return {plain.label: (plain, recomputed) for plain, recomputed in pairs if plain.label is not None}

    def input_bytes(self, block_index: int) -> int:
        """Return the bytes of a block's inputs that no earlier block had."""
        return self.recomputed.input_bytes[self.representatives[block_index]]

    def expand(self, recomputes: Callable[[int], bool], keeps_inputs: Callable[[int], bool]) -> Iterator[StepSegment]:
        """Yield the step with some blocks recomputed, and their inputs kept on the device or offloaded.

        Offloaded inputs leave the device when their block is done, and return when its backward pass begins.
        """
        for counted in self.plain.segments:
            if counted.label is None:
                yield StepSegment(counted, False, None)
                continue
            name, number = counted.label
            is_backward = name == BACKWARD
            block_indices = self.block_indices[number]
            for block_index in reversed(block_indices) if is_backward else block_indices:
                segment = self.by_label[name, self.representatives[block_index]][recomputes(block_index)]
                if recomputes(block_index) and not keeps_inputs(block_index):
                    segment = drop_input(segment, self.input_bytes(block_index), is_backward)
                yield StepSegment(segment, is_backward, block_index)


def drop_input(segment: Segment, input_bytes: int, is_backward: bool) -> Segment:
    """Return the segment of a block with its inputs in main memory between its passes."""
    if is_backward:
        return replace(segment, delta=segment.delta + input_bytes, rise=segment.rise + input_bytes)
    return replace(segment, delta=segment.delta - input_bytes)


def compute_peak_bytes(parts: Iterator[StepSegment] | Sequence[StepSegment]) -> int:
    """Return the peak bytes relative to the start of the step."""
    live = peak = 0
    for part in parts:
        peak = max(peak, live + part.segment.rise)
        live += part.segment.delta
    return peak


@dataclass(frozen=True)
class CountedOptimizer:
    """Bytes that an optimizer needs."""

    state: int  # kept between steps
    rise: int  # peak during a step, including the state, without gradients


Groups = Sequence[Mapping[str, Any]]
"""The parameter groups of an optimizer."""


def count_optimizer(
    build: Callable[[Groups], torch.optim.Optimizer], groups: Groups, counter: OperationCounter
) -> CountedOptimizer:
    """Count one optimizer step with zero gradients."""
    all_parameters = [parameter for group in groups for parameter in group["params"]]
    counter.leave_out(all_parameters)
    with counter:  # constructors that read fake tensors get its `answers`
        optimizer, parameters = build(groups), all_parameters
        # Adam allocates the state of a whole group first, and then updates one parameter after the other. So one group
        # is counted with fewer parameters, and the state of the others is added: for a large U-Net, 18 of 1444
        # parameters give the same bytes in 0.15 instead of 9.5 CPU seconds.
        is_short = len(groups) == 1 and has_state_first(optimizer)
        if is_short:
            parameters = short_walk(all_parameters)
            optimizer = build([{**groups[0], "params": parameters}])
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        counter.restart()
        optimizer.step()
        counter.cut()
        segment = counter.segments[-1]
        for parameter in parameters:
            parameter.grad = None
    left_out_bytes = state_left_out(optimizer, all_parameters) if is_short else 0
    return CountedOptimizer(segment.delta + left_out_bytes, segment.rise + left_out_bytes)


def has_state_first(optimizer: torch.optim.Optimizer) -> bool:
    """Return True for an optimizer that allocates the state of a whole group before it updates a parameter."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def short_walk(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return fewer parameters with the same pairs of neighbouring kinds.

    The peak depends on pairs: temporary memory of one parameter is freed while the next one is computed.
    """
    kept: list[nn.Parameter] = []
    pairs: set[tuple[Hashable, Hashable]] = set()
    num_needed = 0  # number of kept parameters that are needed; later ones repeat pairs
    for parameter in parameters:
        if kept and (pair := (describe_parameter(kept[-1]), describe_parameter(parameter))) not in pairs:
            pairs.add(pair)
            num_needed = len(kept) + 1
        kept.append(parameter)
        # Cut back to the first parameter of this kind after the needed ones: the parameters in between are a loop.
        kinds = [describe_parameter(p) for p in kept[max(num_needed - 1, 0) :]]
        del kept[max(num_needed - 1, 0) + kinds.index(describe_parameter(parameter)) + 1 :]
    return kept


def describe_parameter(parameter: Tensor) -> Hashable:
    return tuple(parameter.shape), parameter.dtype


def state_left_out(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> int:
    """Return the state bytes of the parameters that the optimizer does not have."""
    sizes = {describe_parameter(p): bytes_touched(values) for p, values in optimizer.state.items()}
    return sum(sizes[describe_parameter(p)] for p in parameters if p not in optimizer.state)
