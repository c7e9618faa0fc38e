"""The denoiser of Stable Diffusion 3 and 3.5 (MMDiT, Esser et al. 2024), in the layout of the original checkpoints.

Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of
the latent, h and w sides in patches, P patch side, T tokens, N heads, D head width, M model width, V pooled width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from library.architectures.sd3.layers import TARGETS
from library.architectures.sd3.positions import nearest_side, scaled_positions, table_side
from library.base.errors import UserError, error_in
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.devices import send
from library.models.fused_norms import gated_sum, modulated_norm
from library.models.patches import unpatchify
from library.models.shapes import ShapeReader
from library.models.sinusoids import TimestepEmbedder

EPS = 1e-6
HEAD_WIDTH = 64  # of models without query norms, whose shapes do not show it


@dataclass(frozen=True)
class MMDiTConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    width: int
    depth: int
    head_width: int
    mlp_width: int
    patch: int
    in_channels: int
    context_width: int
    pooled_width: int
    positions_side: int  # the table has positions_side ** 2 positions
    norms_queries: bool
    dual_attention: frozenset[int]  # blocks whose image stream has a second self-attention


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> MMDiTConfig:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader("SD3", shapes)
    shape, depth = read.shape, read.count("joint_blocks")
    width, in_channels, patch, _ = shape("x_embedder.proj.weight")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    # min: a model that is narrower than a usual head has one head.
    head_width = shapes[norm][0] if norm in shapes else min(HEAD_WIDTH, width)
    num_positions = shape("pos_embed")[-2]
    side = math.isqrt(num_positions)
    if width % head_width or side**2 != num_positions:
        raise UserError(f"not an SD3 model: width {width} with heads of {head_width}, {num_positions} positions")
    return MMDiTConfig(
        width=width,
        depth=depth,
        head_width=head_width,
        mlp_width=shape("joint_blocks.0.x_block.mlp.fc1.weight")[0],
        patch=patch,
        in_channels=in_channels,
        context_width=shape("context_embedder.weight")[1],
        pooled_width=shape("y_embedder.mlp.0.weight")[1],
        positions_side=side,
        norms_queries=norm in shapes,
        dual_attention=frozenset(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
    )


def recognise_version(config: MMDiTConfig) -> str:
    """Return the published model that a configuration resembles: "medium", "5-medium" or "5-large"."""
    if not config.norms_queries:
        return "medium"
    return "5-medium" if config.dual_attention else "5-large"


class MMDiT(nn.Module):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, timesteps and text."""

    adapter_targets = TARGETS
    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.runner: BlockRunner = plain
        self.scaled_sides: tuple[int, ...] = ()  # sides, in patches, of the resolutions that positions are scaled to
        self.x_embedder = PatchEmbed(c.in_channels, c.width, c.patch)
        self.register_buffer("pos_embed", torch.zeros(1, c.positions_side**2, c.width))
        self.t_embedder = TimestepEmbedder(c.width, c.width)
        self.y_embedder = VectorEmbedder(c.pooled_width, c.width)
        self.context_embedder = nn.Linear(c.context_width, c.width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(c, is_last=i == c.depth - 1, has_dual_attention=i in c.dual_attention) for i in range(c.depth)
        )
        self.final_layer = FinalLayer(c.width, c.patch**2 * c.in_channels)

    def stacks(self) -> Stacks:
        """Return the blocks that `runner` runs."""
        return [[*self.joint_blocks]]

    def forward(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        context_BTM: Tensor,
        pooled_BV: Tensor,
        corner: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the velocity, shape BCHW.

        `timesteps_B` is 1000 times the share of noise. `corner` (top, left) is the image's location in the table of
        positions, None for the centre.
        """
        P = self.config.patch
        h, w = (side // P for side in latents_BCHW.shape[-2:])
        # Not the dtype of a layer, whose weight a network module may have taken away (LyCORIS' algo=full).
        x_BTM = self.x_embedder(latents_BCHW.to(self.pos_embed.dtype))
        x_BTM = x_BTM + self.positions(h, w, corner).to(x_BTM.dtype)
        c_BM = self.t_embedder(timesteps_B, x_BTM.dtype) + self.y_embedder(pooled_BV)
        context_BTM = self.context_embedder(context_BTM)
        for block in self.joint_blocks:
            context_BTM, x_BTM = self.runner(block, context_BTM, x_BTM, c_BM)
        return unpatchify(self.final_layer(x_BTM, c_BM), h, w, P, channels_last=True)

    def table_side(self, h: int, w: int) -> int:
        """Return the side of the position table for an image of h x w patches."""
        if self.scaled_sides:
            return table_side(nearest_side(h, w, self.scaled_sides))
        return self.config.positions_side

    def positions(self, h: int, w: int, corner: tuple[int, int] | None) -> Tensor:
        """Return the positions of an image of h x w patches, cut from the table, shape (1, h w, M).

        Raises UserError for an image larger than the model's own table.
        """
        if self.scaled_sides:
            side = nearest_side(h, w, self.scaled_sides)
            return send(scaled_positions(h, w, side, corner, self.config.width), self.pos_embed.device)
        side = self.config.positions_side
        if h > side or w > side:
            pixels = side * self.config.patch * 8
            raise error_in("--resolution")(
                f"an image of {w * self.config.patch * 8}x{h * self.config.patch * 8} pixels exceeds this model's "
                f"limit of {pixels}x{pixels}",
                "lower --resolution or --max_bucket_reso",
            )
        top, left = ((side - h) // 2, (side - w) // 2) if corner is None else corner
        table_1yxM = self.pos_embed.view(1, side, side, -1)
        return table_1yxM[:, top : top + h, left : left + w].flatten(1, 2)


class PatchEmbed(nn.Module):
    """The embedding of P x P latents as a token."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        tokens_BTM: Tensor = self.proj(latents_BCHW).flatten(2).transpose(1, 2)
        return tokens_BTM


class VectorEmbedder(nn.Module):
    """Two linear layers for the pooled text features."""

    def __init__(self, pooled_width: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(pooled_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, pooled_BV: Tensor) -> Tensor:
        embedding_BM: Tensor = self.mlp(pooled_BV)
        return embedding_BM


class SelfAttention(nn.Module):
    """The projections of one stream; attention itself spans the streams."""

    def __init__(self, config: MMDiTConfig, has_output: bool = True) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.norms_queries = config.norms_queries
        self.qkv = nn.Linear(config.width, 3 * config.width)
        if config.norms_queries:
            self.ln_q: nn.Module = nn.RMSNorm(config.head_width, eps=EPS)
            self.ln_k: nn.Module = nn.RMSNorm(config.head_width, eps=EPS)
        else:
            self.ln_q = self.ln_k = nn.Identity()
        if has_output:
            self.proj = nn.Linear(config.width, config.width)

    def queries_keys_values(self, x_BTM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each BNTD."""
        q, k, v = self.qkv(x_BTM).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        # The norm saves its input for the backward pass; a view would keep queries, keys and values alive.
        q, k = (q.contiguous(), k.contiguous()) if self.norms_queries else (q, k)
        return self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype), v


def attend(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor) -> Tensor:
    """Return the attention output, shape BTM."""
    return scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM: Tensor = self.fc2(self.act(self.fc1(x_BTM)))
        return y_BTM


def modulate(x_BTM: Tensor, shift_BM: Tensor, scale_BM: Tensor) -> Tensor:
    """Normalize, scale and shift tokens."""
    return modulated_norm(x_BTM, shift_BM[:, None], scale_BM[:, None])


def make_modulation(width: int, num_parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, num_parts * width))


class SingleDiTBlock(nn.Module):
    """One stream of a joint block. Network modules find the layers by this class name.

    The last block's text stream only provides queries, keys and values; it has no output.
    """

    def __init__(self, config: MMDiTConfig, has_output: bool = True, has_dual_attention: bool = False) -> None:
        super().__init__()
        self.has_output = has_output
        self.has_dual_attention = has_dual_attention
        self.attn = SelfAttention(config, has_output=has_output)
        if has_dual_attention:
            self.attn2 = SelfAttention(config)
        if has_output:
            self.mlp = Mlp(config.width, config.mlp_width)
        self.num_parts = (9 if has_dual_attention else 6) if has_output else 2
        self.adaLN_modulation = make_modulation(config.width, self.num_parts)

    def modulation(self, c_BM: Tensor) -> tuple[Tensor, ...]:
        """Return 2, 6 or 9 tensors, BM: shift and scale of attention; then its gate, shift, scale and gate of the
        MLP; then shift, scale and gate of the second attention."""
        parts: tuple[Tensor, ...] = self.adaLN_modulation(c_BM).chunk(self.num_parts, dim=-1)
        return parts

    def finish(self, x_BTM: Tensor, attended_BTM: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Return the stream after both attentions and the MLP."""
        shift_mlp_BM, scale_mlp_BM = parts[3:5]
        after_BTM = gated_sum(x_BTM, parts[2][:, None], self.attn.proj(attended_BTM))
        if self.has_dual_attention:
            shift_BM, scale_BM, gate_BM = parts[6:]
            # It reads the block's input like the first attention, not the first one's output.
            qkv = self.attn2.queries_keys_values(modulate(x_BTM, shift_BM, scale_BM))
            after_BTM = gated_sum(after_BTM, gate_BM[:, None], self.attn2.proj(attend(*qkv)))
        mlp_BTM: Tensor = self.mlp(modulate(after_BTM, shift_mlp_BM, scale_mlp_BM))
        return gated_sum(after_BTM, parts[5][:, None], mlp_BTM)


class JointBlock(nn.Module):
    """Text and image streams with their own weights that attend to each other."""

    def __init__(self, config: MMDiTConfig, is_last: bool, has_dual_attention: bool) -> None:
        super().__init__()
        self.context_block = SingleDiTBlock(config, has_output=not is_last)
        self.x_block = SingleDiTBlock(config, has_dual_attention=has_dual_attention)

    def forward(self, context_BTM: Tensor, x_BTM: Tensor, c_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Return both streams; the last block leaves the text unchanged, because nothing reads it afterwards."""
        streams = ((self.context_block, context_BTM), (self.x_block, x_BTM))
        parts = [block.modulation(c_BM) for block, _ in streams]
        projected = [
            block.attn.queries_keys_values(modulate(tokens, *part[:2]))
            for (block, tokens), part in zip(streams, parts, strict=True)
        ]
        q, k, v = (torch.cat(both, dim=2) for both in zip(*projected, strict=True))
        del projected  # free it before the MLPs
        num_context = context_BTM.shape[1]
        if not self.context_block.has_output:
            return context_BTM, self.x_block.finish(x_BTM, attend(q[:, :, num_context:], k, v), parts[1])
        attended_BTM = attend(q, k, v)
        return (
            self.context_block.finish(context_BTM, attended_BTM[:, :num_context], parts[0]),
            self.x_block.finish(x_BTM, attended_BTM[:, num_context:], parts[1]),
        )


class FinalLayer(nn.Module):
    """The last layer, which maps tokens to patches of the velocity."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_outputs)
        self.adaLN_modulation = make_modulation(width, 2)

    def forward(self, x_BTM: Tensor, c_BM: Tensor) -> Tensor:
        shift_BM, scale_BM = self.adaLN_modulation(c_BM).chunk(2, dim=-1)
        patches: Tensor = self.linear(modulate(x_BTM, shift_BM, scale_BM))
        return patches
