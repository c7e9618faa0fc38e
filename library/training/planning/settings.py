"""Translates between planner choices and options."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from library.memory.planner.choice import Allowed
from library.memory.planner.prediction import MemoryMode
from library.memory.planner.weights import Matrix, StorageCost
from library.options.machine.distributed import DistributedOptions
from library.options.machine.fit import FitOptions
from library.options.machine.memory import MemoryOptions, PrecisionOptions
from library.options.train import TrainOptions

SMALLER = ("int8", "nf4")  # weight formats to suggest
TYPICAL_WEIGHT = Matrix(3072, 3072, itemsize=2)
EVERY = (None, 3, 2, 1)  # recompute one of this many blocks; larger intervals hardly save memory


def resolve_memory_mode(
    memory: MemoryOptions, precision: PrecisionOptions, distributed: DistributedOptions
) -> MemoryMode:
    return MemoryMode(
        weight_format=precision.denoiser_format,
        recompute_every=memory.gradient_checkpointing_every if memory.recomputes else None,
        offloads_inputs=memory.offloads_inputs,
        num_offloaded=memory.num_offloaded,
        num_slots=memory.block_swap_ring_size,
        shared_by=num_shares(distributed),
    )


def num_shares(options: DistributedOptions) -> int:
    """Return the number of processes that share the denoiser's weights."""
    return (options.shard_group or 1) if options.shard_base else 1


def option_values(mode: MemoryMode) -> dict[str, Any]:
    return {
        "base_format": mode.weight_format,
        "gradient_checkpointing": mode.recompute_every is not None,
        "gradient_checkpointing_every": mode.recompute_every or 1,
        "cpu_offload_checkpointing": mode.offloads_inputs,
        "blocks_to_swap": mode.num_offloaded or None,
        "block_swap_ring_size": mode.num_slots,
        "shard_base": mode.shared_by > 1,
        "shard_group": mode.shared_by if mode.shared_by > 1 else None,
    }


def changes(
    values: Mapping[str, Any], own_format: str | None, memory: MemoryOptions, mode: MemoryMode
) -> dict[str, Any]:
    """Return a configuration's options that differ from the user's, which are `values`."""
    changed = {name: value for name, value in option_values(mode).items() if value != values[name]}
    if mode.weight_format == own_format:  # whichever option requested it
        changed.pop("base_format", None)
    # That option means both already.
    if memory.unsloth_offload_checkpointing and mode.offloads_inputs:
        changed.pop("gradient_checkpointing", None)
        changed.pop("cpu_offload_checkpointing", None)
    return changed


def format_options(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Format options as typed, leaving out defaults."""
    chosen = [(name, value) for name, value in values.items() if value != defaults[name]]
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in chosen)


def describe(mode: MemoryMode) -> str:
    """Format a configuration's options as typed."""
    return format_options(option_values(mode), TrainOptions.defaults()) or "plain"


def resolve_allowed(fit: FitOptions, memory: MemoryOptions, mode: MemoryMode) -> Allowed:
    """Return the search space around `mode`, the configuration of the options; options that the user set are fixed."""
    return Allowed(
        weight_formats=tuple(fit.fit_formats or (mode.weight_format,)),
        recompute_every=(mode.recompute_every,) if memory.recomputes else EVERY,
        offloads_inputs=(True,) if mode.offloads_inputs or memory.cpu_offload_checkpointing else (False, True),
        num_offloaded=memory.blocks_to_swap,
        num_slots=mode.num_slots,
        shared_by=mode.shared_by,
    )


def resolve_allowed_ever(precision: PrecisionOptions, distributed: DistributedOptions) -> Allowed:
    """Return the whole search space, with the current weight format and those of SMALLER that take fewer bytes."""
    name = precision.denoiser_format
    allowed = replace(Allowed(), recompute_every=EVERY, shared_by=num_shares(distributed))
    if precision.multiplies_codes:
        return replace(allowed, weight_formats=(name,))
    own_bytes = None if name is None else StorageCost.of(name).num_bytes(TYPICAL_WEIGHT)
    smaller = [
        other for other in SMALLER if own_bytes is None or StorageCost.of(other).num_bytes(TYPICAL_WEIGHT) < own_bytes
    ]
    return replace(allowed, weight_formats=(name, *smaller))
