"""Predicted memory and time of a step, in one memory mode on a given GPU."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from library.memory.activations import NUM_KEPT
from library.memory.offload.pinning import SHARE_BESIDE_INPUTS
from library.memory.offload.ring import NUM_SLOTS
from library.memory.pinned import rounded_size
from library.memory.planner.gpus import GIB, Gpu
from library.memory.planner.speed import StepSpeed, Work
from library.memory.planner.steps import CountedOptimizer, StepSegment, Timeline, compute_peak_bytes
from library.memory.planner.weights import ModelWeights, StorageCost

# Assumptions until a GPU has been measured: the CUDA context with the workspaces of its libraries, and the overhead of
# the allocator as a share of a step's tensors.
CONTEXT_BYTES = 7 * GIB // 10
ALLOCATOR_SHARE = 0.05

FORWARD_BACKWARD, OPTIMIZER_STEP = "forward and backward pass", "optimizer step"


@dataclass(frozen=True)
class MemoryMode:
    """How a step saves memory: weight format, recomputation, offloading and sharding."""

    weight_format: str | None = None  # of the frozen weights; None for the dtype of --mixed_precision
    recompute_every: int | None = None  # n recomputes every n-th block; None for none
    offloads_inputs: bool = False  # inputs of recomputed blocks are kept in main memory between the passes
    num_offloaded: int = 0  # --blocks_to_swap
    shared_by: int = 1  # processes over which the denoiser is sharded, --shard_base
    num_slots: int = NUM_SLOTS  # on the device, for the offloaded blocks, --block_swap_ring_size

    @property
    def complexity(self) -> int:
        """Number of features added to a plain step. Those that need main memory count twice, since pinning can fail."""
        return (self.recompute_every is not None) + 2 * self.offloads_inputs + 2 * (self.num_offloaded > 0)

    def recomputes(self, block_index: int) -> bool:
        return self.recompute_every is not None and block_index % self.recompute_every == 0


@dataclass(frozen=True)
class GradientlessPasses:
    """The passes without gradients of a step, before its own forward pass."""

    num_passes: float  # on average
    num_batches: float  # size of all of them together, in batches of the step
    peak_bytes: int  # of the one that needs most


@dataclass(frozen=True)
class CountedStep:
    """A counted training step. Bytes are those of tensors."""

    timeline: Timeline
    first_block_index: int  # index of the denoiser's first block in the timeline; trained text encoders come before
    weights: ModelWeights  # of the denoiser
    encoders: tuple[ModelWeights, ...]  # of the text encoders that stay in memory
    own_formats: tuple[str | None, str | None]  # of denoiser and text encoders, as set by the user
    other_bytes: int  # of everything else that stays in memory
    adapter_bytes: int
    gradient_bytes: int
    held_gradient_bytes: int  # gradients of earlier passes, with gradient accumulation
    optimizer: CountedOptimizer
    offloaded_indices: Callable[[int], Collection[int]]  # the blocks offloaded for a value of --blocks_to_swap
    most_offloaded: int
    multiplies_codes: bool = False  # the step was counted with --base_arithmetic 8bit
    gradientless: GradientlessPasses | None = None  # None if a step has only a forward and a backward pass
    feature_bytes: int = 0  # of captions' features that stay in memory, once the last one has been encoded
    batch_bytes: int = 0  # of pinned main memory, from which batches are copied


@dataclass(frozen=True)
class ModeCost:
    """Predicted memory and time in a mode."""

    mode: MemoryMode
    weight_bytes: int  # of frozen models on the device
    tensor_bytes: int  # at the peak of training
    device_bytes: int  # including CUDA context and allocator overhead
    seconds: float  # per forward and backward pass
    host_bytes: int  # of main memory, for offloaded blocks and inputs
    peak: str  # the phase that needs most memory
    error: float | None  # of the weight format, relative to a layer's output; None without a format
    pins_inputs: bool  # False if offloaded inputs cannot be pinned beside offloaded weights and batches

    @property
    def weight_format(self) -> str | None:
        return self.mode.weight_format

    @property
    def complexity(self) -> int:
        return self.mode.complexity


def predict(step: CountedStep, mode: MemoryMode, gpu: Gpu, correction: float = 1.0) -> ModeCost:
    """Predict the memory and time in a mode.

    `correction` is the measured ratio of real to counted bytes of a step's tensors, without weights.
    """
    cost = StorageCost.of(mode.weight_format)
    cost = cost.of_8bit_matmul() if step.multiplies_codes else cost
    offloaded = step.offloaded_indices(mode.num_offloaded)
    parts = list(apply_mode(step, mode))
    denoiser_format, text_format = step.own_formats
    text_cost = StorageCost.of(text_format if mode.weight_format == denoiser_format else mode.weight_format)
    encoder_bytes = sum(encoder.resident_bytes(text_cost, ()) for encoder in step.encoders)
    if mode.shared_by > 1:
        denoiser_bytes = step.weights.shared_bytes(cost, mode.shared_by)
    else:
        denoiser_bytes = step.weights.resident_bytes(cost, offloaded, mode.num_slots)
    weight_bytes = denoiser_bytes + encoder_bytes + step.other_bytes
    kept_bytes = step.optimizer.state + step.held_gradient_bytes
    passes = step.gradientless
    # Offloaded inputs stay for another block while they are copied, and are fetched one block ahead.
    copied_bytes = sum(sorted(offloaded_input_bytes(step, mode))[-NUM_KEPT:])
    peak_bytes = max(compute_peak_bytes(parts) + copied_bytes, 0 if passes is None else passes.peak_bytes)
    pass_bytes = kept_bytes + peak_bytes + step.weights.decoded_bytes(cost)
    optimizer_bytes = step.gradient_bytes + max(step.optimizer.rise, step.optimizer.state)
    fixed_bytes = weight_bytes + step.feature_bytes
    training_bytes = step.adapter_bytes + round(correction * max(pass_bytes, optimizer_bytes))
    block_sizes = step.weights.block_bytes(cost)
    streamed_bytes = sum(block_sizes[block_index] for block_index in offloaded)
    input_sizes = offloaded_input_bytes(step, mode)
    input_bytes, pinned_other_bytes = sum(input_sizes), step.batch_bytes + sum(map(rounded_size, input_sizes))
    pinned_weight_bytes = gpu.pinned_bytes(streamed_bytes, SHARE_BESIDE_INPUTS if mode.offloads_inputs else 1.0)
    pins_inputs = (
        not input_sizes or gpu.pinnable_bytes is None or pinned_weight_bytes + pinned_other_bytes <= gpu.pinnable_bytes
    )
    weights_s = gpu.copy_seconds(streamed_bytes, pinned_weight_bytes)
    inputs_s = gpu.copy_seconds(input_bytes, input_bytes if pins_inputs else 0)
    forward, backward = pass_work(parts)
    ahead = (0.0, 0.0) if passes is None else (passes.num_batches, passes.num_passes)
    speed = StepSpeed(forward, backward, cost.slowdown, *ahead, overlaps=mode.num_slots > 1)
    seconds = speed.seconds(gpu, weights_s, inputs_s, len(offloaded) / max(1, len(block_sizes)))
    # The allocator's overhead comes from temporary tensors; weights are allocated once.
    device_bytes = fixed_bytes + round((1 + ALLOCATOR_SHARE) * training_bytes) + CONTEXT_BYTES
    # The tensors of the passes are freed before the optimizer steps, so the larger of the two is the peak.
    peak = FORWARD_BACKWARD if pass_bytes >= optimizer_bytes else OPTIMIZER_STEP
    return ModeCost(
        mode,
        weight_bytes,
        fixed_bytes + training_bytes,
        device_bytes,
        seconds,
        streamed_bytes + input_bytes,
        peak,
        cost.error,
        pins_inputs,
    )


def pass_work(parts: Iterable[StepSegment]) -> tuple[Work, Work]:
    """Return the work of the forward and of the backward pass."""
    totals = {False: Work(), True: Work()}
    for part in parts:
        totals[part.is_backward] += Work(part.segment.flops, part.segment.moved, part.segment.launches)
    return totals[False], totals[True]


def apply_mode(step: CountedStep, mode: MemoryMode) -> list[StepSegment]:
    """Return the segments of the step as this mode runs it. Blocks of trained text encoders are numbered separately."""

    def recomputes(block_index: int) -> bool:
        if block_index < step.first_block_index:
            return mode.recomputes(block_index)
        return mode.recomputes(block_index - step.first_block_index)

    return list(step.timeline.expand(recomputes, lambda block_index: not mode.offloads_inputs))


def offloaded_input_bytes(step: CountedStep, mode: MemoryMode) -> list[int]:
    """Return the bytes of the inputs of each block that are offloaded between its forward and backward pass."""
    if not mode.offloads_inputs:
        return []
    return [
        step.timeline.input_bytes(block_index)
        for block_index in range(len(step.timeline.blocks))
        if mode.recomputes(
            block_index if block_index < step.first_block_index else block_index - step.first_block_index
        )
    ]
