"""The denoiser of Krea 2 (Krea AI 2026), in the layout of the original checkpoints.

All tokens are one stream: the text, the noisy image, then reference images, which stay clean and are modulated at noise
level 0. A small transformer first fuses the states of several layers of the text encoder into one feature per token.
Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of
the latent, h and w sides in patches, L text tokens, S states of a token, E text width, T tokens, M model width, R noise
levels (the noisy image's, and that of references if there are any), V values of a modulation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from library.architectures.krea2.layers import TARGETS
from library.base.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.devices import send
from library.memory.fused_kernels import fuses
from library.models.fused_norms import rotated_norm, shifted_norm, sigmoid_product, silu_product
from library.models.patches import key_mask, patchify, unpatchify
from library.models.rotary import Rope, Rotary, apply_rope
from library.models.shapes import ShapeReader
from library.models.sinusoids import sinusoids
from library.models.token_parts import add_gated, by_parts

PATCH = 2
ROPE_BASE = 1000
ROPE_SHARES = (2, 3, 3)  # of a head's values, in eighths, that rotate with (time, row, column)
ROPE_STEP = 16  # head widths are multiples, so that every share is an even number of values
rotate_norm = rotated_norm(1e-5)
TIME_SCALE = 1000
NUM_MODULATIONS = 6  # scale, shift and gate of attention, then of the feed-forward layer

GELU = partial(nn.GELU, approximate="tanh")


@dataclass(frozen=True)
class AttentionConfig:
    """The sizes of a kind of block."""

    width: int
    head_width: int
    num_kv_heads: int
    mlp_width: int


@dataclass(frozen=True)
class Krea2Config:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of a patch: four times the channels of the latent
    time_features: int  # of a noise level
    num_states: int  # layers of the text encoder whose states are fused
    block: AttentionConfig
    fusion: AttentionConfig
    num_layerwise: int
    num_refiners: int
    num_blocks: int

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """The number of values of a head that rotate with (time, row, column): 32, 48 and 48 of 128."""
        return tuple(self.block.head_width // 8 * share for share in ROPE_SHARES)


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> Krea2Config:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader("Krea 2", shapes)
    block, fusion = read_sizes(read, "blocks.0"), read_sizes(read, "txtfusion.layerwise_blocks.0")
    if block.head_width % ROPE_STEP:
        raise UserError(f"not a Krea 2 model: heads of {block.head_width}, which must be multiples of {ROPE_STEP}")
    return Krea2Config(
        in_features=read.shape("first.weight")[1],
        time_features=read.shape("tmlp.0.weight")[1],
        num_states=read.shape("txtfusion.projector.weight")[1],
        block=block,
        fusion=fusion,
        num_layerwise=read.count("txtfusion.layerwise_blocks"),
        num_refiners=read.count("txtfusion.refiner_blocks"),
        num_blocks=read.count("blocks"),
    )


def read_sizes(read: ShapeReader, block: str) -> AttentionConfig:
    """Read the sizes of a block. Raises UserError for invalid ones."""
    width, head_width = read.shape(f"{block}.attn.wq.weight")[0], read.shape(f"{block}.attn.qknorm.qnorm.scale")[0]
    num_kv_heads, remainder = divmod(read.shape(f"{block}.attn.wk.weight")[0], head_width)
    if width % head_width or remainder or (width // head_width) % num_kv_heads:
        raise UserError(
            f"not a Krea 2 model: {block} has width {width}, heads of {head_width} and {num_kv_heads} heads of keys"
        )
    return AttentionConfig(width, head_width, num_kv_heads, read.shape(f"{block}.mlp.gate.weight")[0])


class RMSNorm(nn.Module):
    """Root mean square norm with the factor 1 + `scale`, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return shifted_norm(x, self.scale, None, None)


class QKNorm(nn.Module):
    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.qnorm = RMSNorm(head_width)
        self.knorm = RMSNorm(head_width)


def rotate(norm: RMSNorm, x: Tensor, rope: Rope | None) -> Tensor:
    """Normalize and rotate queries or keys (..., T, N, D). Returns (..., N, T, D)."""
    if rope is not None and fuses(x):
        return rotate_norm(x.transpose(-3, -2), norm.scale.float() + 1, rope)
    # Normalize before heads and tokens are transposed, because norms copy non-contiguous tensors.
    x = norm(x).transpose(-3, -2)
    return x if rope is None else apply_rope(x, rope)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with a sigmoid gate on its output; T is the last axis but one."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.num_repeats = config.width // config.head_width // config.num_kv_heads
        kv_width = config.num_kv_heads * config.head_width
        self.wq = nn.Linear(config.width, config.width, bias=False)
        self.wk = nn.Linear(config.width, kv_width, bias=False)
        self.wv = nn.Linear(config.width, kv_width, bias=False)
        self.gate = nn.Linear(config.width, config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.qknorm = QKNorm(config.head_width)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_width)) for layer in (self.wq, self.wk, self.wv))
        q, k = rotate(self.qknorm.qnorm, q, rope), rotate(self.qknorm.knorm, k, rope)
        v = v.transpose(-3, -2)
        if self.num_repeats > 1:
            k, v = (part.repeat_interleave(self.num_repeats, dim=-3) for part in (k, v))
        shape = q.shape
        q, k, v = (part.flatten(0, -4) for part in (q, k, v))  # attention has fast kernels for four axes
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask).view(shape).transpose(-3, -2).flatten(-2)
        y: Tensor = self.wo(sigmoid_product(attended, self.gate(x)))
        return y


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM: Tensor = self.down(silu_product(self.gate(x_BTM), self.up(x_BTM)))
        return y_BTM


class TextFusionBlock(nn.Module):
    """Attention and a feed-forward layer, without positions and modulation."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.prenorm = RMSNorm(config.width)
        self.postnorm = RMSNorm(config.width)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.prenorm(x), None, mask)
        fused: Tensor = x + self.mlp(self.postnorm(x))
        return fused


class TextFusion(nn.Module):
    """Fusion of a token's states: blocks within the states of a token, a weighted sum, then blocks across tokens."""

    def __init__(self, config: Krea2Config) -> None:
        super().__init__()
        self.layerwise_blocks = nn.ModuleList(TextFusionBlock(config.fusion) for _ in range(config.num_layerwise))
        self.projector = nn.Linear(config.num_states, 1, bias=False)
        self.refiner_blocks = nn.ModuleList(TextFusionBlock(config.fusion) for _ in range(config.num_refiners))

    def forward(self, states_BLSE: Tensor, mask: Tensor | None, runner: BlockRunner) -> Tensor:
        """Return text features, BLE; `mask` marks the keys that may be attended to."""
        # Samples stay the first axis, by which adapters tell them apart.
        for block in self.layerwise_blocks:
            states_BLSE = runner(block, states_BLSE, None)
        x_BLE: Tensor = self.projector(states_BLSE.transpose(-1, -2)).squeeze(-1)
        for block in self.refiner_blocks:
            x_BLE = runner(block, x_BLE, mask)
        return x_BLE


class Modulation(nn.Module):
    """A learned offset of the modulation that is computed from the noise level."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.lin = nn.Parameter(torch.empty(shape))


class SingleStreamBlock(nn.Module):
    """Attention and a feed-forward layer over all tokens. Network modules find the layers by this class name."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.mod = Modulation(NUM_MODULATIONS * config.width)
        self.prenorm = RMSNorm(config.width)
        self.postnorm = RMSNorm(config.width)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(
        self, x_BTM: Tensor, modulation_BRV: Tensor, rope: Rope, mask: Tensor | None, num_clean: int = 0
    ) -> Tensor:
        """Return the tokens, BTM; the last `num_clean` are modulated by the second row."""
        rows = (modulation_BRV + self.mod.lin).chunk(NUM_MODULATIONS, dim=-1)
        scale_attn, shift_attn, gate_attn, scale_mlp, shift_mlp, gate_mlp = rows
        lengths = [x_BTM.shape[1] - num_clean, num_clean] if num_clean else [x_BTM.shape[1]]
        y_BTM = modulate(self.prenorm, x_BTM, scale_attn, shift_attn, lengths)
        x_BTM = add_gated(x_BTM, gate_attn, self.attn(y_BTM, rope, mask), lengths)
        y_BTM = modulate(self.postnorm, x_BTM, scale_mlp, shift_mlp, lengths)
        return add_gated(x_BTM, gate_mlp, self.mlp(y_BTM), lengths)


def modulate(norm: RMSNorm, x_BTM: Tensor, scales_BRM: Tensor, shifts_BRM: Tensor, lengths: Sequence[int]) -> Tensor:
    """Normalize tokens, scale them by 1 + the scales of their part, and add its shifts."""

    def run(part_BTM: Tensor, scale_B1M: Tensor, shift_B1M: Tensor) -> Tensor:
        return shifted_norm(part_BTM, norm.scale, scale_B1M, shift_B1M)

    return by_parts(run, lengths, [x_BTM], [scales_BRM, shifts_BRM])


class LastLayer(nn.Module):
    """The last layer, which maps tokens to patches of the velocity."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, out_features)
        self.modulation = Modulation(2, width)

    def forward(self, x_BTM: Tensor, time_B1M: Tensor) -> Tensor:
        scale_B1M, shift_B1M = (time_B1M + self.modulation.lin).chunk(2, dim=1)
        patches_BTF: Tensor = self.linear(shifted_norm(x_BTM, self.norm.scale, scale_B1M, shift_B1M))
        return patches_BTF


class SingleStreamDiT(nn.Module):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, noise levels and text."""

    adapter_targets = TARGETS

    def __init__(self, config: Krea2Config) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        self.rotary = Rotary(config.rope_axes, ROPE_BASE)
        width, text_width = config.block.width, config.fusion.width
        self.first = nn.Linear(config.in_features, width)
        self.tmlp = nn.Sequential(nn.Linear(config.time_features, width), GELU(), nn.Linear(width, width))
        self.tproj = nn.Sequential(GELU(), nn.Linear(width, NUM_MODULATIONS * width))
        self.txtfusion = TextFusion(config)
        self.txtmlp = nn.Sequential(RMSNorm(text_width), nn.Linear(text_width, width), GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(SingleStreamBlock(config.block) for _ in range(config.num_blocks))
        self.last = LastLayer(width, config.in_features)

    def stacks(self) -> Stacks:
        """Return the main blocks; the few that fuse text are not offloaded."""
        return [[*self.blocks]]

    def forward(
        self,
        latents_BCHW: Tensor,
        sigmas_B: Tensor,
        text_BLF: Tensor,
        text_mask_BL: Tensor,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the velocity, shape BCHW.

        `sigmas_B` are shares of noise, 0..1. `text_BLF` has the states of a token concatenated, F = S E. `text_mask_BL`
        is 1 for the caption's tokens, which precede its padding; it should be on the host, because the lengths are read
        from it. `references` are the latents of reference images, BCHW each.
        """
        images = (latents_BCHW, *references)
        sides = [(image.shape[-2] // PATCH, image.shape[-1] // PATCH) for image in images]
        (h, w), num_clean = sides[0], sum(h * w for h, w in sides[1:])
        device, dtype = latents_BCHW.device, self.first.weight.dtype
        lengths = [int(length) for length in text_mask_BL.sum(1).tolist()]
        L = max(lengths)
        text_mask = mask = None  # attention has faster kernels without a mask
        if min(lengths) < L:
            is_text_BL = send(torch.arange(L)[None] < torch.tensor(lengths)[:, None], device)
            text_mask, mask = is_text_BL[:, None, None], key_mask(is_text_BL, h * w + num_clean)
        states_BLSE = text_BLF[:, :L].to(dtype).reshape(len(lengths), L, self.config.num_states, -1)
        txt_BLM = self.txtmlp(self.txtfusion(states_BLSE, text_mask, self.runner))
        img_BTM = self.first(torch.cat([patchify(image, PATCH) for image in images], dim=1).to(dtype))
        # Levels are an axis of their own, because adapters tell samples apart by the first.
        levels_BR = torch.stack([sigmas_B, torch.zeros_like(sigmas_B)][: 2 if references else 1], dim=1)
        features_BRV = sinusoids(levels_BR.flatten() * TIME_SCALE, self.config.time_features).view(*levels_BR.shape, -1)
        time_BRM = self.tmlp(features_BRV.to(dtype))
        modulation_BRV = self.tproj(time_BRM)
        extents = len(images), max(h for h, _ in sides), max(w for _, w in sides)
        rope = self.rotary(send(positions(L, sides), device), extents)
        x_BTM = torch.cat([txt_BLM, img_BTM], dim=1)
        for block in self.blocks:
            x_BTM = self.runner(block, x_BTM, modulation_BRV, rope, mask, num_clean)
        return unpatchify(self.last(x_BTM[:, L : L + h * w], time_BRM[:, :1]), h, w, PATCH)


def positions(num_text: int, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Return positions of the tokens, shape (T, 3), on the host: text at (0, 0, 0), row y and column x of image i of
    height and width `sides` at (i, y, x). The noisy image is the first."""
    grids = [torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, side)) for i, side in enumerate(sides)]
    return torch.cat([torch.zeros(num_text, 3, dtype=torch.long), *grids])
