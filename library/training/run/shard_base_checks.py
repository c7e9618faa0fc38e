"""Checks of a sharded base model: incompatible options, and processes that must stay in step."""

import logging
from typing import Any

from library.base.errors import about, error_in
from library.base.launcher import fsdp_version
from library.data.description.preservation import PRESERVATION
from library.data.training_data import TrainingData
from library.memory.offload.sharded import ShardedModel
from library.options.machine.compiling import CompileOptions
from library.options.machine.distributed import DistributedOptions
from library.options.machine.memory import MemoryOptions
from library.options.training.network import NetworkOptions
from library.processes.process_group import Processes
from networks.core.protocol import OURS

logger = logging.getLogger(__name__)


def resolve_launched_values(is_sharded: bool, refusal: str | None = None) -> dict[str, Any]:
    """Return the option values that shard the base model if accelerate is configured for FSDP2.

    Raises UserError for FSDP 1, and with `refusal` if that is why this run cannot shard. Call before accelerate is
    initialized, which raises its own errors for FSDP 1.
    """
    if fsdp_version() == 1:
        raise error_in("--shard_base")(
            "accelerate is configured for FSDP 1, which spreads a model that is trained; the base model is frozen here "
            "and the adapter is small: run `accelerate config` again with FSDP version 2, which means --shard_base, or "
            "give --multi_gpu to accelerate launch"
        )
    if fsdp_version() != 2 or is_sharded:
        return {}
    if refusal is not None:
        raise error_in("--shard_base")(f"accelerate is configured for FSDP2, which means --shard_base: {refusal}")
    logger.info("accelerate is configured for FSDP2: --shard_base spreads the frozen base model over the processes")
    return {"shard_base": True}


def sharding_values(
    distributed: DistributedOptions,
    memory: MemoryOptions,
    network: NetworkOptions,
    compiling: CompileOptions,
    processes: Processes,
) -> dict[str, Any]:
    """Return the number of processes that share the base model, if it is sharded.

    Raises UserError, before anything is read, if the base model cannot be sharded; warns if sharding has no effect.
    """
    if not distributed.shard_base:
        return {}
    if processes.count == 1:
        logger.warning("--shard_base has no effect with one process; accelerate launch --num_processes 2 starts two")
        return {"shard_base": False, "shard_group": None}
    size = distributed.shard_group or processes.local_count
    if size == 1:
        raise about("--shard_base")(
            ": each machine has one process, so nothing would be spread; --shard_group "
            f"{processes.count} spreads the weights over all of them, through the network"
        )
    if processes.count % size:
        sizes = [str(n) for n in range(2, processes.count + 1) if processes.count % n == 0]
        raise about("--shard_base")(
            f": {processes.count} processes cannot be divided into groups of {size} that share the weights",
            f"use --shard_group {' or '.join(sizes)}",
        )
    if memory.blocks_to_swap:
        raise about("--shard_base", others=["--blocks_to_swap"])(
            "and --blocks_to_swap put the same weights at two places, sharded over GPUs and in main memory",
            "leave one of them out",
        )
    module = network.network_module or ""
    if network.base_weights and not module.startswith(OURS):
        raise about("--base_weights", others=["--shard_base"])(
            f"and --shard_base with --network_module {module}: its networks are merged into whole weights, which no "
            "process has",
            "merge the files into the base model with tools/merge_lora.py first, or use one of networks.*",
        )
    if compiling.is_on:
        raise about("--shard_base")(
            ": blocks whose weights come from other processes while they compute cannot be compiled",
            "leave out --compile and --torch_compile",
        )
    return {"shard_group": size}


def preserves_in_step(data: TrainingData, sharded: ShardedModel | None) -> bool:
    """Return True if every batch must run the base model alone because a batch of another process may need it."""
    if sharded is None:
        return False
    subsets = [subset for dataset in data.config.datasets for subset in dataset.subsets]
    return any(bool(subset.custom_attributes.get(PRESERVATION)) for subset in subsets)
