"""Counts one training step, block by block, and plays it again for the whole model in any way of running its blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.memory.blocks import BlockBody, BlockRunner
from library.memory.planner.counter import OperationCounter, Segment

FORWARD, BACKWARD = "forward", "backward"


class MarkedRunner:
    """Runs blocks as another runner does, and cuts the count where a block ends and where its backward pass begins.

    A block's forward stretch begins where the block before it ends, so that what the model does between two blocks,
    such as letting go of the input, belongs to the second.
    """

    def __init__(self, runner: BlockRunner, counter: OperationCounter) -> None:
        self.blocks: list[nn.Module] = []  # in the order of their first call
        self.input_bytes: list[int] = []  # by the same number: of inputs with a gradient that no earlier block had
        self._runner, self._counter = runner, counter
        self._seen: set[int] = set()
        self._backward: tuple[str, int] | None = None

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        body = block.block if isinstance(block, BlockBody) else block
        if body not in self.blocks:
            self.blocks.append(body)
            self.input_bytes.append(self._new_bytes((inputs, named)))
        number = self.blocks.index(body)
        outputs = self._runner(block, *inputs, **named)
        self._counter.cut((FORWARD, number))
        self._mark_backward(outputs, number)
        return outputs

    def finish_pass(self) -> None:
        """End the last stretch of a backward pass."""
        self._counter.cut(self._backward)
        self._backward = None

    def _new_bytes(self, inputs: Any) -> int:
        tensors = [t for t in tree_leaves(inputs) if is_tensor(t) and t.requires_grad]
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        fresh = [storage.nbytes() for key, storage in storages.items() if key not in self._seen]
        self._seen |= set(storages)
        return sum(fresh)

    def _mark_backward(self, outputs: Any, number: int) -> None:
        begun: list[bool] = []

        def begin(_: Tensor) -> None:
            if not begun:  # a block with several outputs begins with the first that has its gradient
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
    """Forward and backward pass of one step as they were counted, blocks by number in the order of their calls."""

    segments: tuple[Segment, ...]
    blocks: tuple[nn.Module, ...]
    input_bytes: tuple[int, ...]


def count_pass(
    loss: Callable[[], Tensor],
    give_runner: Callable[[BlockRunner], None],
    runner: BlockRunner,
    counter: OperationCounter,
    num_passes: int = 1,
) -> CountedPass:
    """Count the last of `num_passes` passes, the gradients of those before being there already, as accumulating does.

    `loss` computes a scalar, its model's blocks run by what `give_runner` gets.
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
    return CountedPass(tuple(counter.segments), tuple(marked.blocks), tuple(marked.input_bytes))


@dataclass(frozen=True)
class Move:
    """A segment of the whole model's step; `place` counts the blocks of the whole model, None outside them."""

    segment: Segment
    is_backward: bool
    place: int | None


@dataclass(frozen=True)
class Timeline:
    """A counted step of the whole model, in both ways of running each block."""

    plain: CountedPass
    recomputed: CountedPass
    blocks: tuple[nn.Module, ...]  # of the whole model, by their place
    places: tuple[range, ...]  # by number: of the blocks for which a counted one stands

    @classmethod
    def build(
        cls, plain: CountedPass, recomputed: CountedPass, stands_for: Mapping[nn.Module, Sequence[nn.Module]]
    ) -> "Timeline":
        """`stands_for` names the blocks of the whole model for which a counted one stands, if they are more than it."""
        assert [s.label for s in plain.segments] == [s.label for s in recomputed.segments], "the passes differ"
        blocks: list[nn.Module] = []
        places = []
        for block in plain.blocks:
            first = len(blocks)
            blocks += stands_for.get(block, [block])
            places.append(range(first, len(blocks)))
        return cls(plain, recomputed, tuple(blocks), tuple(places))

    def moves(self, recomputes: Callable[[int], bool], keeps_inputs: Callable[[int], bool]) -> Iterator[Move]:
        """The step with the blocks at some places recomputed, and with the inputs of these kept on the device or not.

        Inputs that are not kept leave when their block is done, and come back when its backward pass begins.
        """
        for plain, recomputed in zip(self.plain.segments, self.recomputed.segments, strict=True):
            if plain.label is None:
                yield Move(plain, False, None)
                continue
            name, number = plain.label
            is_backward = name == BACKWARD
            places = self.places[number]
            for place in reversed(places) if is_backward else places:
                segment = recomputed if recomputes(place) else plain
                if recomputes(place) and not keeps_inputs(place):
                    segment = without_input(segment, self.recomputed.input_bytes[number], is_backward)
                yield Move(segment, is_backward, place)


def without_input(segment: Segment, input_bytes: int, is_backward: bool) -> Segment:
    """The stretch of a block whose inputs wait in main memory between its passes."""
    if is_backward:
        return replace(segment, delta=segment.delta + input_bytes, rise=segment.rise + input_bytes)
    return replace(segment, delta=segment.delta - input_bytes)


def peak_of(moves: Iterator[Move] | Sequence[Move]) -> int:
    """The most bytes above those at the start of the step."""
    live = peak = 0
    for move in moves:
        peak = max(peak, live + move.segment.rise)
        live += move.segment.delta
    return peak


@dataclass(frozen=True)
class CountedOptimizer:
    """What an optimizer needs, in bytes."""

    state: int  # that it keeps
    rise: int  # most while it steps, the state included, the gradients not


def count_optimizer(
    build: Callable[[], torch.optim.Optimizer], parameters: Sequence[nn.Parameter], counter: OperationCounter
) -> CountedOptimizer:
    """Take one step with gradients of zero."""
    counter.leave_out(parameters)
    with counter:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = build()
        counter.restart()
        optimizer.step()
        counter.cut()
        segment = counter.segments[-1]
        for parameter in parameters:
            parameter.grad = None
    return CountedOptimizer(segment.delta, segment.rise)
