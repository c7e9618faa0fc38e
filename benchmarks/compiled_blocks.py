"""Count the kernels of a training step of SDXL's U-Net that `--compile` leaves: those that Inductor generates for each
kind of block, and the products, convolutions and attention that it calls.

The U-Net has the layers of SDXL, a tenth of its width and a small image, which change no count, and a LoRA. Compiled
for the CPU, so no GPU is needed; takes some minutes.

    python -m benchmarks compiled_blocks
"""

import argparse
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.runner import measurement
from library.base.command_parser import make_parser
from library.memory.blocks import plain
from library.memory.planner.counter import OperationCounter
from library.memory.planner.fakes import emulate_cuda_norms
from library.models.unet.unet import run_unet_blocks_with, unet_stacks
from library.training.models.block_running import cast_factors_of
from networks import lora
from networks.core.protocol import adopt

WIDTH, TEXT = 32, 64
GENERATED, CALLED = r"(?m)^\s+cpp_fused\w*\(", r"extern_kernels\.\w+\(|torch\.ops\.[\w.]+\("
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def narrow_sdxl() -> tuple[nn.Module, nn.Module]:
    """Return the U-Net in bf16 and the LoRA on it."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.architectures.sd.assembly import view
    from tests.tiny.sd import CLIP

    model = UNet2DConditionModel(
        block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=TEXT,
        use_linear_projection=True,
    )
    model.requires_grad_(False).eval().to(torch.bfloat16)
    seen = view([CLIPTextModel(CLIPTextConfig(**CLIP))], model)[1]
    network = lora.create_network(1.0, 4, 4, None, [], seen)
    network.apply_to([], seen, False, True)
    cast_factors_of(adopt(network), unet_stacks(model))
    return model, network


def both_directions(run: Callable[..., Any], *inputs: Any, **named: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [value for value in tree_leaves(run(*inputs, **named)) if isinstance(value, Tensor)]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def count_eager(run: Callable[..., Any], *inputs: Any, **named: Any) -> int:
    with OperationCounter() as counter:
        both_directions(run, *inputs, **named)
    return counter.launches


def count_compiled(block: nn.Module, *inputs: Any, **named: Any) -> tuple[int, int]:
    """Return the kernels that Inductor generates, and the others that it calls."""
    codes: list[str] = []
    torch._dynamo.reset()
    with mock.patch.object(GraphLowering, "save_output_code", codes.append):
        both_directions(torch.compile(block.__call__, dynamic=True), *inputs, **named)
    calls = [code[code.index("def call(") :] for code in codes]
    return tuple(sum(len(re.findall(kind, code)) for code in calls) for kind in (GENERATED, CALLED))  # type: ignore[return-value]


def setup_parser() -> argparse.ArgumentParser:
    return make_parser(__doc__)


def count(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    model, network = narrow_sdxl()
    calls: list[Call] = []

    def note(block: nn.Module, *inputs: Any, **named: Any) -> Any:
        calls.append((block, inputs, named))
        return plain(block, *inputs, **named)

    run_unet_blocks_with(model, note)
    values = torch.randn(1, 4, 32, 32), torch.tensor([500]), torch.randn(1, 77, TEXT)
    with emulate_cuda_norms():
        whole = count_eager(lambda: model(*values).sample)
        kinds: dict[str, list[Call]] = {}
        for call in calls:
            shapes = [tuple(value.shape) for value in tree_leaves(call[1:]) if isinstance(value, Tensor)]
            kinds.setdefault(f"{type(call[0].block).__name__} {shapes}", []).append(call)  # type: ignore[union-attr]
        sums = [0, 0, 0]
        print("| block | blocks | kernels | compiled: generated | called |\n|---|---|---|---|---|")
        for kind, (call, *others) in kinds.items():
            inputs, named = tree_map_only(Tensor, Tensor.detach, call[1:])
            for value in inputs:  # the text, which is named, has no gradient
                value.requires_grad_()
            network.zero_grad()
            counts = (count_eager(plain, call[0], *inputs, **named), *count_compiled(call[0], *inputs, **named))
            sums = [total + count * (1 + len(others)) for total, count in zip(sums, counts, strict=True)]
            print(f"| {kind} | {1 + len(others)} | {' | '.join(map(str, counts))} |", flush=True)
    print(f"| all | {len(calls)} | {' | '.join(map(str, sums))} |\n{whole - sums[0]} kernels run outside of blocks")


main = measurement(setup_parser, count)
