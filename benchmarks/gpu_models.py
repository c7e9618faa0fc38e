"""Denoisers in full size with random weights made on the GPU, in each memory mode, for benchmarks/gpu_step.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.flux.model import Flux, FluxConfig
from library.memory.activations import RecomputeFromMainMemory
from library.memory.blocks import BlockRunner, Every, Stacks, plain, recompute, run_blocks_with, stacks_of
from library.memory.codecs.plain import Plain
from library.memory.codecs.weight_format import load_format
from library.memory.frozen import freeze_layer, layers_in_blocks
from library.memory.offload.streamed import choose_blocks, stream


@dataclass(frozen=True)
class Mode:
    """How a denoiser is kept and run; `share` of the blocks of each kind are offloaded to main memory."""

    weight_format: str = "none"
    share: float = 0.0
    runner: str = "recompute"
    compiles: bool = False
    multiplies_codes: bool = False  # with 8-bit matrix products

    def __str__(self) -> str:
        waits = f", {self.share:.0%} of the blocks offloaded" if self.share else ""
        name = "bf16" if self.weight_format == "none" else self.weight_format
        return f"{name}{waits}, {self.runner.replace('_', ' ')}"


FLUX = FluxConfig(
    in_features=64, width=3072, head_width=128, mlp_width=12288, text_width=4096, pooled_width=768, num_double=1,
    num_single=1, has_guidance=True,
)  # fmt: skip
"""One block of each kind."""

MEMORY_MODES = (
    Mode(),
    Mode(runner="every_2"),
    Mode(runner="from_main_memory"),
    Mode("fp8"),
    Mode("int8"),
    Mode("int8_rotated"),
    Mode("nf4"),
    Mode(share=0.5),
    Mode(share=0.85),
    Mode(share=0.85, runner="from_main_memory"),
    Mode("int8", 0.5),
    Mode("int8", 0.85),
    Mode("nf4", 0.5),
)
RUNNERS: Mapping[str, Callable[[], BlockRunner]] = {
    "plain": lambda: plain,
    "recompute": lambda: recompute,
    "every_2": lambda: Every(2, recompute),
    "from_main_memory": RecomputeFromMainMemory,
}


@dataclass(frozen=True)
class Subject:
    """A denoiser to measure: how to build it on the meta device, its inputs, and access to its blocks."""

    build: Callable[[], nn.Module]
    values: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    view: Callable[[nn.Module], nn.Module]
    stacks: Callable[[nn.Module], Stacks]
    run_blocks_with: Callable[[nn.Module, BlockRunner], None]


def flux(is_tiny: bool) -> Subject:
    from library.architectures.flux.layers import view

    small = {"width": 64, "head_width": 32, "mlp_width": 256, "text_width": 32, "num_double": 4, "num_single": 6}
    config = replace(FLUX, **small if is_tiny else {"num_double": 19, "num_single": 38})
    side = 8 if is_tiny else 128

    def values() -> tuple[tuple[Any, ...], dict[str, Any]]:
        text, pooled = torch.randn(1, 512, config.text_width), torch.randn(1, config.pooled_width)
        return (torch.randn(1, 16, side, side), torch.tensor([0.5]), text, pooled, torch.tensor([1.0])), {}

    return Subject(lambda: Flux(config), values, lambda model: view([], model)[1], stacks_of, run_blocks_with)


def sdxl(is_tiny: bool) -> Subject:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.architectures.sd.assembly import view
    from library.models.unet.unet import run_unet_blocks_with, unet_stacks
    from tests.tiny.sd import CLIP, UNET

    config: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])
    more = {} if is_tiny else {"added_cond_kwargs": {"text_embeds": torch.randn(1, 1280), "time_ids": sizes}}
    width, side = (UNET["cross_attention_dim"], 8) if is_tiny else (2048, 128)

    def values() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(1, 4, side, side), torch.tensor([500]), torch.randn(1, 77, width)), more

    def seen(model: nn.Module) -> nn.Module:
        return view([CLIPTextModel(CLIPTextConfig(**CLIP))], model)[1]

    return Subject(
        lambda: UNet2DConditionModel(**UNET if is_tiny else config), values, seen, unet_stacks, run_unet_blocks_with
    )


def random_weight(like: Tensor, device: torch.device) -> Tensor:
    return torch.randn(like.shape, dtype=torch.bfloat16, device=device) / max(1, like[0].numel()) ** 0.5


@torch.no_grad()
def build_randomly(subject: Subject, mode: Mode, device: torch.device) -> nn.Module:
    """Return the denoiser with random weights in the mode's format; those of offloaded blocks are in main memory."""
    with torch.device("meta"):
        model = subject.build()
    stacks = subject.stacks(model)
    counts = [min(int(len(stack) * mode.share), max(len(stack) - 2, 0)) for stack in stacks]
    waits = {
        layer
        for stack, count in zip(stacks, counts, strict=True)
        for i in choose_blocks(len(stack), count)
        for layer in stack[i].modules()
    }
    for layer in layers_in_blocks(model).values():
        place = torch.device("cpu") if layer in waits else device
        weight = random_weight(layer.weight, device)  # type: ignore[arg-type]
        if mode.weight_format == "none" and layer not in waits:
            layer.weight = nn.Parameter(weight)
            continue
        freeze_layer(load_format(mode.weight_format).codec if mode.weight_format != "none" else Plain(), layer, weight)
        for name, part in layer.own_parts().items():  # type: ignore[operator]
            setattr(layer, name, nn.Parameter(part.to(place), requires_grad=False))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device)
                scale = 0.02 if parameter.ndim < 2 else max(1, parameter[0].numel()) ** -0.5
                setattr(module, name, nn.Parameter(value * scale))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=torch.bfloat16, device=device))
    model.requires_grad_(False).eval()
    stream(stacks, counts, device)
    return model
