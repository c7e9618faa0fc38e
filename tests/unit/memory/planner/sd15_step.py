"""One training step of a U-Net of SD 1.5's size: the memory that the planner predicts, and the growth of this process.

Run as a module in a process of its own: `python -m tests.unit.memory.planner.sd15_step SIDE 0|1`, the last for
recomputing. Prints both figures in bytes as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.architectures.sd import load as sd
from library.architectures.sd.layers import TARGETS
from library.memory.blocks import BlockRunner, plain, recompute
from library.memory.devices import bytes_of, tensors_of
from library.memory.planner.counter import OperationCounter
from library.memory.planner.fakes import give_fakes
from library.memory.planner.repeats import shorten_runs
from library.memory.planner.steps import Timeline, compute_peak_bytes, count_pass
from library.models.unet.unet import empty_unet, run_unet_blocks_with, unet_chains
from networks import lora
from tests.contracts.full_size import checkpoint

SMALL = {"block_out_channels": (64, 64, 64, 64), "attention_head_dim": 1}
TEXT_WIDTH = 768


def built(changed: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Return (U-Net, adapter of rank 16 on it) on the meta device."""
    parts = sd.single_file_parts("--flag", checkpoint("sd15"), "sd1")
    unet = empty_unet({**parts["unet"].config, **changed}).requires_grad_(False).eval()
    unet.adapter_targets = TARGETS
    targets: tuple[list[nn.Module], nn.Module] = ([], unet)
    with torch.device("meta"):
        network = lora.create_network(1.0, 16, 16.0, None, *targets)
        network.apply_to(*targets, False, True)
    return unet, network.train()


def loss_of(unet: nn.Module, side: int) -> Tensor:
    latents, text = torch.randn(1, 4, side // 8, side // 8), torch.randn(1, 77, TEXT_WIDTH)
    output: Tensor = unet(latents, torch.tensor([501]), text).sample
    return output.square().mean()


def planned_bytes(side: int, recomputes: bool) -> int:
    """Counted from at most two transformer blocks of each kind."""
    unet, network = built({})
    fixed = bytes_of(unet, network)
    with shorten_runs(unet_chains(unet)) as repeats, FakeTensorMode(allow_non_fake_inputs=True):
        give_fakes(unet)
        give_fakes(network)
        passes = []
        for runner in (plain, recompute):
            for parameter in network.parameters():
                parameter.grad = None
            counter = OperationCounter({"int": 1, "float": 0.5, "bool": True})
            counter.leave_out(tensors_of(unet, network))
            passes.append(
                count_pass(lambda: loss_of(unet, side), lambda r: run_unet_blocks_with(unet, r), runner, counter)
            )
    moves = Timeline.build(passes[0], passes[1], repeats).expand(lambda i: recomputes, lambda i: True)
    return fixed + compute_peak_bytes(list(moves))


def take_step(changed: dict[str, Any], side: int, runner: BlockRunner) -> None:
    """Run one step on real tensors that are all written to, so that they occupy memory."""
    unet, network = built(changed)
    for module in (*unet.modules(), *network.modules()):
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                layout = torch.channels_last if old.ndim == 4 else torch.contiguous_format
                new = torch.empty(old.shape, dtype=old.dtype, memory_format=layout).fill_(0.01)
                held[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    run_unet_blocks_with(unet, runner)
    loss_of(unet, side).backward()


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    side, recomputes = int(sys.argv[1]), bool(int(sys.argv[2]))
    runner = recompute if recomputes else plain
    planned = planned_bytes(side, recomputes)
    take_step(SMALL, 128, runner)  # one-time allocations: threads, oneDNN kernels
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = resident_bytes("VmRSS")
    take_step({}, side, runner)
    print(json.dumps({"planned": planned, "grown": resident_bytes("VmHWM") - before}))


if __name__ == "__main__":
    main()
