"""How the frozen models' weights are stored, and which of them are offloaded."""

import logging
import shutil
from collections import Counter
from pathlib import Path

import psutil
import torch
from torch import nn

from library.base.errors import about
from library.checkpoints.weights import to_meta_device
from library.memory.blocks import Stacks
from library.memory.codecs.plain import Plain
from library.memory.codecs.scaled import Scaled
from library.memory.devices import move_to_device
from library.memory.frozen import (
    FrozenLayer,
    FrozenLinear,
    freeze_layers,
    frozen_layers,
    layers_in_blocks,
    multiply_codes,
)
from library.memory.offload.pinning import SHARE_BESIDE_INPUTS
from library.memory.offload.sharded import PEAK_BLOCKS, ShardedModel
from library.memory.offload.shared import place_for, share_masters
from library.memory.offload.streamed import bytes_of_parts, stream
from library.memory.planner.weights import ModelWeights, StorageCost
from library.options.machine.distributed import DistributedOptions
from library.options.machine.memory import MemoryOptions, PrecisionOptions
from library.processes.process_group import Processes
from library.protocols import Architecture
from library.training.models.compute import Compute
from library.training.models.weight_formats import BaseFormats, check_format, store_in_format
from library.training.step.context import Models

logger = logging.getLogger(__name__)

NUM_STAYING = 2  # blocks of each kind that are not offloaded, as in sd-scripts


def check_base(precision: PrecisionOptions, memory: MemoryOptions, arch: Architecture) -> None:
    """Raise UserError, before anything is read, for an unsupported weight format or number of blocks."""
    check_format(precision.denoiser_format)  # also a format that --fit chose
    if memory.num_offloaded:
        denoiser = to_meta_device(arch.load).denoiser()
        count_offloaded_blocks(memory.num_offloaded, arch.stacks(denoiser))
        check_main_memory(precision.denoiser_format, memory.num_offloaded, denoiser)


def check_main_memory(format_name: str | None, num_offloaded: int, denoiser: nn.Module) -> None:
    """Raise UserError if the denoiser in its weight format does not fit main memory, which it passes through."""
    cost = StorageCost.of(format_name)
    needed = ModelWeights.of(denoiser, layers_in_blocks(denoiser).values(), []).resident_bytes(cost, ())
    free = psutil.virtual_memory().available
    if needed > free:
        raise about("--blocks_to_swap")(
            f"{num_offloaded}: the denoiser takes {needed / 1e9:.1f} GB of main memory on its way to the GPU and "
            f"{free / 1e9:.1f} GB are free",
            "close other programs, or store it in fewer bits with --base_format int8 or nf4",
        )


def count_offloaded_blocks(num_blocks: int, stacks: Stacks) -> list[int]:
    """Return the number of offloaded blocks of each stack, counted as in sd-scripts.

    With two kinds of blocks, half of the number is taken from the first kind and the other half counts two blocks of
    the second kind each; if one kind has too few, the other one offloads more. Two blocks of each kind stay. Raises
    UserError if there are not enough blocks.
    """
    if num_blocks > (most := most_offloaded(stacks)):
        sizes = " and ".join(str(len(stack)) for stack in stacks)
        raise about("--blocks_to_swap")(
            f"{num_blocks}: the model has {sizes} blocks and must keep {NUM_STAYING} of each kind on "
            f"the GPU, so at most {most} can be swapped"
        )
    if len(stacks) == 1:
        return [num_blocks]
    # With many more blocks of the second kind, half of the number would leave most of them on the GPU.
    room, room_of_second = room_in_stacks(stacks)
    first = max(min(num_blocks // 2, room), num_blocks - room_of_second // 2)
    return [first, 2 * (num_blocks - first)]


def most_offloaded(stacks: Stacks) -> int:
    """Return the largest number that `count_offloaded_blocks` takes."""
    first, *second = room_in_stacks(stacks)
    return first + sum(room // 2 for room in second)


def room_in_stacks(stacks: Stacks) -> list[int]:
    """Return how many blocks of each stack need not stay on the GPU."""
    return [max(len(stack) - NUM_STAYING, 0) for stack in stacks]


def open_sharded(options: DistributedOptions, processes: Processes) -> ShardedModel | None:
    """Return what shards the denoiser over processes; None if each process keeps all of it."""
    size = options.shard_group
    if not options.shard_base or size is None or processes.count == 1:
        return None
    return ShardedModel(processes.device, processes.count, size)


def resolve_base(
    precision: PrecisionOptions,
    formats: BaseFormats,
    memory: MemoryOptions,
    arch: Architecture,
    models: Models,
    compute: Compute,
    processes: Processes,
) -> None:
    """Store the frozen models in their weight formats and move the denoiser to the device.

    Call after other adapters are merged, and before the adapter is attached, which may read the weights.
    """
    num_scaled = sum(isinstance(layer.decoder, Scaled) for layer in frozen_layers(models.denoiser))
    if num_scaled:
        logger.info("denoiser: %d layers in 8 bits, as the file has them", num_scaled)
    if formats.denoiser is not None:
        count = store_in_format(formats.denoiser.codec, models.denoiser)
        logger.info("denoiser: %d layers in %s", count, precision.denoiser_format)
    if precision.multiplies_codes:
        use_8bit_matmul(models.denoiser)
    if formats.text_encoders is not None and models.text_encoders:
        count = store_in_format(formats.text_encoders.codec, *models.text_encoders)
        logger.info("text encoders: %d layers in %s", count, precision.text_encoder_format)
    if memory.num_offloaded:
        offload_blocks(memory, arch.stacks(models.denoiser), compute.device, processes)
    if models.sharded is not None:
        shard_blocks(models.sharded, models.denoiser, arch.stacks(models.denoiser))
    move_to_device(models.denoiser, compute.device)


def use_8bit_matmul(denoiser: nn.Module) -> None:
    """Make the denoiser's layers multiply in 8 bits, and log those that cannot. Call before weights are offloaded."""
    layers = list(frozen_layers(denoiser))
    count = multiply_codes(layers)
    reasons = Counter(explain_no_matmul(layer) for layer in layers if not layer.multiplies_codes)
    if not count:
        raise about("--base_arithmetic")(
            "8bit: no layer of the denoiser supports 8-bit products", "remove --base_arithmetic"
        )
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    decoded = f"; {reasons.total()} are decoded: {listed}" if reasons else ""
    logger.info("denoiser: %d layers multiply in 8 bits%s", count, decoded)


def explain_no_matmul(layer: FrozenLayer) -> str:
    """Explain why a layer cannot multiply in 8 bits."""
    if not isinstance(layer, FrozenLinear):
        return "convolutions"
    codes = layer.decoder.codes(layer.handle())
    if codes is None or codes.scales.ndim > 2:
        return "whose weight format has several scales per row or no 8-bit codes"
    return "whose sizes are no multiples of 8 (int8) or 16 (fp8)"


def shard_blocks(sharded: ShardedModel, denoiser: nn.Module, stacks: Stacks) -> None:
    """Shard what was not sharded while reading, and group the shards by block."""
    freeze_layers(Plain(), layers_in_blocks(denoiser).values())
    for layer in frozen_layers(denoiser):
        sharded.keep_shard(layer)
    sharded.resolve(stacks)
    logger.info(
        "denoiser: %d blocks and layers (%.2f GB) spread over %d processes, %.2f GB in each; gathered blocks take up "
        "to %.2f GB more",
        sharded.num_blocks,
        sharded.num_bytes / 1e9,
        sharded.group_size,
        sharded.num_bytes / sharded.group_size / 1e9,
        PEAK_BLOCKS * sharded.most_bytes / 1e9,
    )


def offload_blocks(memory: MemoryOptions, stacks: Stacks, device: torch.device, processes: Processes) -> None:
    """Offload the weights of --blocks_to_swap blocks; blocks without a weight format keep their dtype.

    Processes of one machine wait for the first one, which copies the weights into shared files. Once all have mapped
    these files they are unlinked, so that the memory is freed as soon as the last process ends.
    """
    freeze_layers(Plain(), (layer for stack in stacks for block in stack for layer in block.modules()))
    num_offloaded = count_offloaded_blocks(memory.num_offloaded, stacks)
    num_slots = memory.block_swap_ring_size
    share = SHARE_BESIDE_INPUTS if memory.offloads_inputs else 1.0
    if processes.local_count == 1:
        stream(stacks, num_offloaded, device, num_slots=num_slots, pinned_share=share)
        return
    num_bytes = sum(bytes_of_parts(block) for stack in stacks for block in stack)
    folder = Path(processes.shared_folder("weights", place_for(num_bytes)))
    if processes.is_local_main:
        stream(stacks, num_offloaded, device, share_masters(folder, is_first=True), num_slots, share)
    processes.wait_for_all("weights in main memory")
    if not processes.is_local_main:
        stream(stacks, num_offloaded, device, share_masters(folder, is_first=False), num_slots, share)
    processes.wait_for_all("mapping the weights in main memory")
    if processes.is_local_main:
        shutil.rmtree(folder, ignore_errors=True)  # Windows keeps mapped files until the process ends
