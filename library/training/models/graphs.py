"""--cuda_graphs: what cannot be recorded is refused before anything is loaded, each with its reason."""

from collections.abc import Iterator

import torch

from library.errors import UserError
from library.options.train import TrainOptions
from library.processes import Processes
from library.protocols import Architecture
from library.training.models.block_running import trains_text_encoders
from library.training.optimization.optimizers import BuiltOptimizer
from library.training.step.context import StepContext
from library.training.step.fixed_step import CudaGraphs, FixedSteps
from library.training.step.skipping import can_leave_out
from networks.core.protocol import parse_network_args

OURS = ("networks.lora", "networks.loha", "networks.lokr", "networks.oft", "networks.boft")
CHANGES_BETWEEN_STEPS = ("rank_dropout", "module_dropout", "ggpo_sigma", "dropout")


def fixed_steps(options: TrainOptions, context: StepContext, optimizer: torch.optim.Optimizer) -> FixedSteps | None:
    """What records the steps of a run, if that is asked for."""
    if not options.graphs.cuda_graphs:
        return None
    return FixedSteps(context, optimizer, options.optimizer.max_grad_norm, CudaGraphs())


def check_graphs(options: TrainOptions, arch: Architecture, device: torch.device, processes: Processes) -> None:
    """Raise UserError where --cuda_graphs is given and a step of this run cannot be recorded."""
    if not options.graphs.cuda_graphs:
        return
    if device.type != "cuda":
        raise UserError(f"--cuda_graphs needs a CUDA card, but this run computes on {device.type}; leave it out")
    reason = next(reasons(options, arch, processes.count), None)
    if reason is not None:
        raise UserError(f"--cuda_graphs cannot record this run: {reason}")


def check_optimizer(built: BuiltOptimizer) -> None:
    """Raise UserError for an optimizer whose step the host takes part in."""
    if not (isinstance(built.optimizer, torch.optim.Adam) and can_leave_out(built.optimizer)):
        raise UserError(
            f"--cuda_graphs cannot record this run: the step of {built.name.partition('(')[0]} is no work of the card "
            "alone; use --optimizer_type AdamW, without foreach=True"
        )


def reasons(options: TrainOptions, arch: Architecture, num_processes: int) -> Iterator[str]:
    """Why a step cannot be recorded, each with the way out."""
    memory, network = options.memory, options.network
    if arch.asks_host is not None:
        yield f"{arch.name} {arch.asks_host} on the host in each step; leave it out"
    if num_processes > 1:
        yield f"{num_processes} processes exchange gradients through the host; train with one, or leave it out"
    if options.precision.mixed_precision == "fp16":
        yield "the loss scale of fp16 is found by the host; use --mixed_precision bf16"
    if memory.blocks_to_swap:
        yield "blocks that wait in main memory come to changing places; leave out --blocks_to_swap"
    if memory.recomputes:
        yield "recomputing asks the host for the state of the random numbers; leave out --gradient_checkpointing"
    if options.compiling.is_on:
        yield "compiled blocks have graphs of their own; leave out --compile, or --cuda_graphs"
    if trains_text_encoders(options):
        yield "the text encoders train on captions that the host tokenizes; add --network_train_unet_only"
    if arch.inpaints:
        yield "masks are drawn anew in each step; leave it out with --train_inpainting"
    if options.optimizer.stochastic_rounding and options.precision.full_bf16:
        yield "--stochastic_rounding puts other tensors in the place of the weights; leave it out"
    if network.network_module is not None and not network.network_module.startswith(OURS):
        yield f"nobody knows what {network.network_module} does between steps; use networks.lora"
    given = parse_network_args(network.network_args)
    if network.network_dropout:
        yield "--network_dropout leaves out other values in each step; leave it out"
    for name in CHANGES_BETWEEN_STEPS:
        if given.get(name) not in (None, "", "0", "0.0"):
            yield f"--network_args {name}={given[name]} changes the adapter in each step; leave it out"
