"""Compares the memory-saving modes of a run with plain computation (`--selftest`).

One batch runs in the run's mode, recording the inputs and output gradients of each block. Then each block is recomputed
plainly from these: its weights are copied without the ring, and autograd keeps all activations. At most one block
exists twice, so models that do not fit otherwise can be tested.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from library.base.errors import about
from library.memory.blocks import BlockRunner
from library.memory.frozen import frozen_layers
from library.memory.offload.sharded import ShardedHandle
from library.memory.offload.streamed import OffloadedHandle
from library.training.models.block_running import block_runner
from library.training.run_parts import Run
from library.training.step.losses import loss_of, start_batch
from library.training.step.modes import eval_mode
from library.training.step.pairs import split_passes

logger = logging.getLogger(__name__)

MOST = 10.0  # times the noise floor; a wrong weight or a slot read too early is off by about the gradient's size
NUM_SHOWN = 3

Gradients = dict[str, Tensor]


@dataclass
class BlockCall:
    """One call of a block: its inputs, and the gradients of its outputs, in main memory."""

    block: nn.Module
    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    gradients: dict[int, Tensor] = field(default_factory=dict)  # by output index

    def note(self, place: int, gradient: Tensor) -> None:
        """Keep the gradient of the output at index `place`."""
        self.gradients[place] = gradient.cpu()


@dataclass
class Recorder:
    """A block runner that delegates to another one and records the calls that need gradients."""

    runner: BlockRunner
    calls: list[BlockCall] = field(default_factory=list)

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        outputs = self.runner(block, *inputs, **named)
        if torch.is_grad_enabled():
            call = BlockCall(block, *tree_map_only(Tensor, set_aside, (inputs, named)))
            self.calls.append(call)
            for place, output in enumerate(tree_flatten(outputs)[0]):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(partial(call.note, place))  # type: ignore[no-untyped-call]
        return outputs


def set_aside(value: Tensor) -> Tensor:
    """Copy a block's own input to main memory; inputs shared by all blocks, which have no gradient, are kept."""
    return value.detach().cpu().requires_grad_() if value.requires_grad else value


@dataclass(frozen=True)
class GradientError:
    """The relative error of a parameter's gradient, and the error that rounding alone causes."""

    name: str
    error: float
    floor: float

    @property
    def is_wrong(self) -> bool:
        return not self.error <= MOST * self.floor  # written so that NaN is wrong too


def test_itself(run: Run) -> None:
    """Compare the first batch's gradients in the run's mode with plain ones. Raises UserError if they differ."""
    context = run.context
    network = context.network.module
    (batch,) = run.batches.iterate_epoch(1, [0], lambda index: 0, 0, False)
    recorder = Recorder(block_runner(run.options.memory))
    context.arch.run_blocks_with(context.models.denoiser, recorder)
    with eval_mode([network]):  # no dropout: both passes must see the same network
        passes = split_passes(context, batch)  # the first pass leaves the adapter at its strength
        start_batch(context, 0, 0)
        torch.autograd.backward(loss_of(context, next(passes), 0))
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        for parameter in network.parameters():
            parameter.grad = None
        plain = compute_gradients(run, recorder.calls, 0.0)
        # Rounding to nearest changes a number by at most eps / 2 of its size.
        noisy = compute_gradients(run, recorder.calls, torch.finfo(context_dtype(run)).eps / 2)
    context.arch.run_blocks_with(context.models.denoiser, block_runner(run.options.memory))
    compared = {name: gradients[name] for name in plain if name in gradients}
    report([compare(name, gradient, plain[name], noisy[name]) for name, gradient in compared.items()], recorder.calls)


def context_dtype(run: Run) -> torch.dtype:
    with run.context.autocast():
        device = run.context.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def compute_gradients(run: Run, calls: Sequence[BlockCall], noise: float) -> Gradients:
    """Return the gradients of the adapter's parameters, each block run plainly on its recorded inputs.

    `noise` perturbs inputs and gradients by random relative amounts up to that, to estimate the effect of rounding.
    """
    device, generator = run.context.device, torch.Generator().manual_seed(0)
    parameters = {name: p for name, p in run.context.network.module.named_parameters() if p.requires_grad}
    total: Gradients = {}

    def make_leaf(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        return perturb(value.detach(), noise, generator).to(device).requires_grad_()

    for call in calls:
        inputs, named = tree_map_only(Tensor, make_leaf, (call.inputs, call.named))
        with plain_weights(call.block, device), run.context.autocast():
            outputs = tree_flatten(call.block(*inputs, **named))[0]
            ends = [outputs[place] for place in call.gradients]
            starts = [perturb(gradient, noise, generator).to(device) for gradient in call.gradients.values()]
            if not ends:
                continue
            gradients = torch.autograd.grad(ends, list(parameters.values()), starts, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] = total[name] + gradient if name in total else gradient
    return total


def perturb(value: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Return a value with each number changed by a random relative amount up to `noise`."""
    if not noise or not value.is_floating_point():
        return value
    shares = 2 * torch.rand(value.shape, generator=generator) - 1
    return (value.float() * (1 + noise * shares)).to(value.dtype)


@contextmanager
def plain_weights(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Give the layers of an offloaded block temporary copies of their weights."""
    kinds = OffloadedHandle | ShardedHandle
    handles = {layer: layer.handle for layer in frozen_layers(block) if isinstance(layer.handle, kinds)}
    try:
        for layer, handle in handles.items():
            layer.handle = partial(dict, handle.copied(device))
        yield
    finally:
        for layer, handle in handles.items():
            layer.handle = handle


def compare(name: str, gradient: Tensor, plain: Tensor, noisy: Tensor) -> GradientError:
    """Compare gradients, relative to the size of the plain one."""
    size = plain.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    error = float((gradient.float() - plain.float()).norm() / size)
    return GradientError(name, error, float((noisy.float() - plain.float()).norm() / size))


def report(findings: Sequence[GradientError], calls: Sequence[BlockCall]) -> None:
    """Log the result. Raises UserError if a gradient is off by more than rounding explains."""
    if not findings:
        logger.warning("self-test: no adapter of the denoiser's blocks has a gradient, so there is nothing to compare")
        return
    worst = sorted(findings, key=lambda finding: finding.error / max(finding.floor, 1e-30), reverse=True)
    wrong = [finding for finding in findings if finding.is_wrong]
    lines = [f"{f.name}: off by {f.error:.1e}, rounding alone by {f.floor:.1e}" for f in worst[:NUM_SHOWN]]
    if wrong:
        raise about("--selftest")(
            f": {len(wrong)} of {len(findings)} gradients in {len(calls)} blocks are not those of the plain "
            f"mode: {'; '.join(lines)}. Train without --blocks_to_swap, --shard_base, --base_format or "
            "--gradient_checkpointing, and report this: it is a bug or a fault of the GPU's memory"
        )
    logger.info(
        "self-test: %d gradients in %d blocks equal those of the plain mode: off by %.1e at most, where rounding alone "
        "is off by %.1e",
        len(findings),
        len(calls),
        max(finding.error for finding in findings),
        max(finding.floor for finding in findings),
    )
    for line in lines:
        logger.debug("self-test: %s", line)
