"""The denoiser of Anima: Cosmos-Predict2's transformer (NVIDIA 2025) for single images with a text adapter, in the
layout of the original checkpoints.

Module paths are the keys of the checkpoint (after "net.") and the names of adapters. Letters: B samples, C channels, H
and W sides of the latent, h and w sides in patches, T patches, L text tokens, E text width, N heads, D head width, M
model width, F features of a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from library.architectures.anima.layers import TARGETS
from library.architectures.anima.llm_adapter import EPS, AdapterConfig, Attention, LLMAdapter
from library.architectures.anima.positions import Angles, image_angles
from library.base.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.models.fused_norms import gated_sum, modulated_norm
from library.models.patches import patchify, unpatchify
from library.models.rotary import AxisTables
from library.models.shapes import ShapeReader
from library.models.sinusoids import sinusoids

PATCH = 2
MASK_CHANNELS = 1  # the padding mask, an additional channel of the latents; images are never padded
MIN_HEAD_WIDTH = 12  # a head has at least two values each for frames, rows and columns


@dataclass(frozen=True)
class AnimaConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    channels: int  # of the latent
    width: int
    head_width: int
    mlp_width: int
    text_width: int
    modulation_rank: int
    num_blocks: int
    adapter: AdapterConfig


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> AnimaConfig:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader("Anima", shapes)
    shape, count = read.shape, read.count
    width, in_features = shape("x_embedder.proj.1.weight")
    head_width = shape("blocks.0.self_attn.q_norm.weight")[0]
    adapter_width = shape("llm_adapter.embed.weight")[1]
    adapter_head = shape("llm_adapter.blocks.0.self_attn.q_norm.weight")[0]
    for name, model_width, width_of_head, min_width in (
        ("width", width, head_width, MIN_HEAD_WIDTH),
        ("llm_adapter width", adapter_width, adapter_head, 2),
    ):
        if model_width % width_of_head or width_of_head % 2 or width_of_head < min_width:
            raise UserError(f"not an Anima model: {name} {model_width} with heads of {width_of_head}")
    adapter = AdapterConfig(
        num_words=shape("llm_adapter.embed.weight")[0],
        width=adapter_width,
        source_width=shape("llm_adapter.blocks.0.cross_attn.k_proj.weight")[1],
        head_width=adapter_head,
        mlp_width=shape("llm_adapter.blocks.0.mlp.0.weight")[0],
        num_blocks=count("llm_adapter.blocks"),
    )
    return AnimaConfig(
        channels=in_features // PATCH**2 - MASK_CHANNELS,
        width=width,
        head_width=head_width,
        mlp_width=shape("blocks.0.mlp.layer1.weight")[0],
        text_width=shape("blocks.0.cross_attn.k_proj.weight")[1],
        modulation_rank=shape("blocks.0.adaln_modulation_mlp.1.weight")[0],
        num_blocks=count("blocks"),
        adapter=adapter,
    )


class Anima(nn.Module):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, noise levels and text."""

    adapter_targets = TARGETS

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        self.tables = AxisTables()
        c = config
        self.x_embedder = PatchEmbed((c.channels + MASK_CHANNELS) * PATCH**2, c.width)
        self.t_embedder = nn.Sequential(Sinusoids(c.width), TimestepEmbedding(c.width))
        self.t_embedding_norm = nn.RMSNorm(c.width, eps=EPS)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_blocks))
        self.final_layer = FinalLayer(c.width, c.modulation_rank, c.channels * PATCH**2)
        self.llm_adapter = LLMAdapter(c.adapter)

    def stacks(self) -> Stacks:
        """Return the blocks that `runner` runs."""
        return [[*self.blocks]]

    def forward(
        self,
        latents_BCHW: Tensor,
        sigmas_B: Tensor,
        source_BSE: Tensor,
        source_mask_BS: Tensor,
        ids_BL: Tensor,
        mask_BL: Tensor,
    ) -> Tensor:
        """Return the velocity, shape BCHW.

        `sigmas_B` are shares of noise, 0..1. `source_BSE` are Qwen3's states, zero where `source_mask_BS` is 0;
        `ids_BL` and `mask_BL` are the same captions as T5 tokens.
        """
        dtype = self.llm_adapter.embed.weight.dtype
        h, w = (side // PATCH for side in latents_BCHW.shape[-2:])
        text_BLE = self.llm_adapter(source_BSE.to(dtype), source_mask_BS, ids_BL, mask_BL)
        waves_BM = self.t_embedder[0](sigmas_B).to(dtype)
        time = self.t_embedding_norm(waves_BM), self.t_embedder[1](waves_BM)  # (B, M) and (B, 3 M)
        x_BTM = self.x_embedder(patchify(with_mask(latents_BCHW), PATCH).to(dtype))
        x_BTM = x_BTM.float() if dtype == torch.float16 else x_BTM  # the sum over all blocks overflows float16
        angles = image_angles(self.tables, self.config.head_width, h, w, x_BTM.device)
        for block in self.blocks:
            x_BTM = self.runner(block, x_BTM, text_BLE, *time, angles)
        # Channels come last in the output but first in the input.
        return unpatchify(self.final_layer(x_BTM, *time), h, w, PATCH, channels_last=True)


def with_mask(latents_BCHW: Tensor) -> Tensor:
    """Append the channel of the padding mask to the latents: zeros, because nothing is padded."""
    return torch.cat([latents_BCHW, torch.zeros_like(latents_BCHW[:, :MASK_CHANNELS])], dim=1)


class PatchEmbed(nn.Module):
    """The embedding of patches as tokens. Network modules find its layers by this class name."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(in_features, width, bias=False))

    def forward(self, patches_BTF: Tensor) -> Tensor:
        x_BTM: Tensor = self.proj(patches_BTF)
        return x_BTM


class Sinusoids(nn.Module):
    """An embedding of values as sinusoids, first cosines, then sines; float32, shape (B, M)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, values_B: Tensor) -> Tensor:
        return sinusoids(values_B, self.width)


class TimestepEmbedding(nn.Module):
    """The shift, scale and gate that each layer corrects for itself. Network modules find them by this class name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, waves_BM: Tensor) -> Tensor:
        shared_B3M: Tensor = self.linear_2(silu(self.linear_1(waves_BM)))
        return shared_B3M


class FeedForward(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, mlp_width, bias=False)
        self.layer2 = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM: Tensor = self.layer2(gelu(self.layer1(x_BTM)))
        return y_BTM


def make_modulation(width: int, rank: int, num_values: int) -> nn.Sequential:
    """Build a layer's low-rank correction to the shared shift, scale and gate."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, rank, bias=False), nn.Linear(rank, num_values * width, bias=False))


def modulate(x_BTM: Tensor, shift_BM: Tensor, scale_BM: Tensor) -> Tensor:
    """Normalize, scale and shift tokens, and return them in the dtype of `shift_BM`."""
    return modulated_norm(x_BTM, shift_BM[:, None], scale_BM[:, None]).to(shift_BM.dtype)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, and MLP. Network modules find the layers by this class name."""

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        c = config
        self.self_attn = Attention(c.width, c.width, c.head_width, "output_proj")
        self.cross_attn = Attention(c.width, c.text_width, c.head_width, "output_proj")
        self.mlp = FeedForward(c.width, c.mlp_width)
        self.adaln_modulation_self_attn = make_modulation(c.width, c.modulation_rank, 3)
        self.adaln_modulation_cross_attn = make_modulation(c.width, c.modulation_rank, 3)
        self.adaln_modulation_mlp = make_modulation(c.width, c.modulation_rank, 3)

    def forward(self, x_BTM: Tensor, text_BLE: Tensor, waves_BM: Tensor, shared_B3M: Tensor, angles: Angles) -> Tensor:
        shift, scale, gate = (self.adaln_modulation_self_attn(waves_BM) + shared_B3M).chunk(3, dim=-1)
        y_BTM = modulate(x_BTM, shift, scale)
        x_BTM = gated_sum(x_BTM, gate[:, None], self.self_attn(y_BTM, y_BTM, angles, angles))
        shift, scale, gate = (self.adaln_modulation_cross_attn(waves_BM) + shared_B3M).chunk(3, dim=-1)
        y_BTM = modulate(x_BTM, shift, scale)
        x_BTM = gated_sum(x_BTM, gate[:, None], self.cross_attn(y_BTM, text_BLE, None, None))
        shift, scale, gate = (self.adaln_modulation_mlp(waves_BM) + shared_B3M).chunk(3, dim=-1)
        return gated_sum(x_BTM, gate[:, None], self.mlp(modulate(x_BTM, shift, scale)))


class FinalLayer(nn.Module):
    """The last layer: tokens to patches of the velocity. Network modules find its layers by this class name."""

    def __init__(self, width: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features, bias=False)
        self.adaln_modulation = make_modulation(width, rank, 2)

    def forward(self, x_BTM: Tensor, waves_BM: Tensor, shared_B3M: Tensor) -> Tensor:
        shared_B2M = shared_B3M[:, : 2 * x_BTM.shape[-1]]
        shift, scale = (self.adaln_modulation(waves_BM) + shared_B2M).chunk(2, dim=-1)
        patches_BTF: Tensor = self.linear(modulate(x_BTM, shift, scale))
        return patches_BTF
