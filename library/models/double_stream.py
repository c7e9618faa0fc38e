"""Shared layers of transformers with double and single streams (Black Forest Labs 2024), in the layout of the original
checkpoints.

Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, L text tokens, T all tokens
(text first, then the image), N heads, D head width, M model width, F features of a patch, V rows of modulation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention, silu

from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.fused_kernels import fuses, owned
from library.models.fused_norms import gated_sum, modulated_norm, rotated_norm, swiglu
from library.models.layer_keys import LayerKeys, Layers, Stack, is_norm, list_leaves
from library.models.rotary import Rope, Rotary, apply_rope
from library.models.sinusoids import sinusoids
from networks.core.targets.targets import Part, qkv_and_rest, thirds

EPS = 1e-6
rotate_norm = rotated_norm(EPS)
# The sinusoids were trained on timesteps of 0 to 1000 (time_factor in the original code).
LEVEL_SCALE = 1000
SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers has shift and scale in reverse order
ATTENTION: Layers = {  # layers of double blocks -> diffusers' paths
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}


DOUBLE_GELU: Layers = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    **ATTENTION,
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: Layers = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
RANKS: Mapping[str, str] = {
    "img_attn_dim": r"\.img_attn\.",
    "txt_attn_dim": r"\.txt_attn\.",
    "img_mlp_dim": r"\.img_mlp\.",
    "txt_mlp_dim": r"\.txt_mlp\.",
    "single_dim": r"^single_blocks\.\d+\.linear",
}
TARGET_FIELDS: Mapping[str, Any] = {  # fields of `AdapterTargets`
    "denoiser": Part("lora_unet", blocks=("DoubleStreamBlock", "SingleStreamBlock"), attention=("SelfAttention",)),
    "ranks": RANKS,
    "block_choices": {
        "train_double_block_indices": r"^double_blocks\.(\d+)\.",
        "train_single_block_indices": r"^single_blocks\.(\d+)\.",
    },
    "subsets": {"double": r"^double_blocks\.", "single": r"^single_blocks\."},
    "fused": {r"_attn\.qkv$": thirds, r"\.linear1$": qkv_and_rest},
}


def is_scale(path: str) -> bool:
    """Return True for the path of a norm, including one in a list of norms."""
    return is_norm(path) or ".norms." in path


def list_stream_leaves(path: str) -> Mapping[str, str]:
    return {"scale": "weight"} if is_scale(path) else list_leaves(path)


def stream_keys(top: Mapping[str, str], double: Layers, single: Layers, *more: Stack, **settings: Any) -> LayerKeys:
    """Build a base model's `LayerKeys` from the layers of its double and single blocks, from more stacks and from other
    fields."""
    stacks = (
        Stack("double_blocks", "transformer_blocks", double),
        Stack("single_blocks", "single_transformer_blocks", single),
    )
    return LayerKeys(top, (*stacks, *more), SWAPPED, list_stream_leaves, is_scale, **settings)


@dataclass(frozen=True)
class StreamConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of an image token
    width: int
    head_width: int
    mlp_width: int  # of the values between the MLP's two layers
    text_width: int
    num_double: int
    num_single: int
    has_guidance: bool  # true for a guidance-distilled model, which takes the guidance strength as an input

    has_biases: ClassVar[bool] = True
    is_gated: ClassVar[bool] = False  # the MLP is SwiGLU (Shazeer 2020) instead of GELU


MakeModulation = Callable[[int, int], nn.Module]
"""Builds a block's modulation from (number of parts, index of the first row): a module that returns shift, scale and
gate of each part, each (B, 1, M)."""


class StreamTransformer(nn.Module):
    """The layers of a denoiser and the loop over its blocks. Subclasses add embeddings of numbers, modulation and
    positions."""

    txt_in: nn.Module

    def __init__(self, config: StreamConfig, rotary: Rotary) -> None:
        super().__init__()
        self.runner: BlockRunner = plain
        self.rotary = rotary
        self.img_in = nn.Linear(config.in_features, config.width, bias=config.has_biases)

    def add_streams(self, config: StreamConfig, make_modulation: MakeModulation, last: nn.Module) -> None:
        """Add the layers after the embeddings of numbers; `last` computes shift and scale of the last layer."""
        c = config
        self.txt_in = nn.Linear(c.text_width, c.width, bias=c.has_biases)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(c, make_modulation) for _ in range(c.num_double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(c, make_modulation) for _ in range(c.num_single))
        self.final_layer = LastLayer(c, last)

    def stacks(self) -> Stacks:
        """Return the blocks that `runner` runs: the double blocks, then the single blocks."""
        return [[*self.double_blocks], [*self.single_blocks]]

    def embed_text(self, *text: Tensor) -> Tensor:
        """Embed the text features as tokens, BLM."""
        txt_BLM: Tensor = self.txt_in(*text)
        return txt_BLM

    def run_blocks(
        self,
        patches_BTF: Tensor,
        text: tuple[Tensor, ...],
        vecs: Iterator[Tensor],
        rope: Rope,
        mask: Tensor | None,
        num_tokens: int,
    ) -> Tensor:
        """Embed patches and text, and run all blocks and the last layer; return the velocity, (B, `num_tokens`, F).

        `text` are the arguments of `embed_text`. `vecs` yields the modulation of each double block, each single block
        and the last layer, in this order. Image tokens after the first `num_tokens`, those of reference images, are
        dropped.
        """
        # Embed here, not in the caller: its variables would keep the embeddings in memory until the last block is done.
        img_BTM, txt_BLM = self.img_in(patches_BTF), self.embed_text(*text)
        for block in self.double_blocks:
            img_BTM, txt_BLM = self.runner(block, img_BTM, txt_BLM, next(vecs), rope, mask)
        x_BTM = torch.cat([txt_BLM, img_BTM], dim=1)
        for block in self.single_blocks:
            x_BTM = self.runner(block, x_BTM, next(vecs), rope, mask)
        first = txt_BLM.shape[1]
        out_BTF: Tensor = self.final_layer(x_BTM[:, first : first + num_tokens], next(vecs))
        return out_BTF


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU in between."""

    def __init__(self, in_features: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_features, width, bias=bias)
        self.out_layer = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_layer(silu(self.in_layer(x)))
        return y


def embed_level(embedder: nn.Module, values_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Embed one number per sample, such as the noise level or the guidance strength; shape BM."""
    vec_BM: Tensor = embedder(sinusoids(LEVEL_SCALE * values_B.float()).to(dtype))
    return vec_BM


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # autograd saves x, and a view would keep its whole base tensor
        return functional.rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * self.scale.to(x.dtype)


def attend(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention output, shape BTM."""
    return scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, attn_mask=mask).transpose(1, 2).flatten(2)


class QKNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)


def heads(qkv: Sequence[Tensor], norm: QKNorm, head_width: int, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each BNTD, from projections BTM; normalize and rotate queries and keys."""
    q, k, v = (part.unflatten(-1, (-1, head_width)).transpose(1, 2) for part in qkv)  # type: ignore[no-untyped-call]
    if fuses(q):
        return rotate_norm(q, norm.query_norm.scale, rope), rotate_norm(k, norm.key_norm.scale, rope), v
    return apply_rope(norm.query_norm(q), rope), apply_rope(norm.key_norm(k), rope), v


class SelfAttention(nn.Module):
    """The projections of one stream; attention itself spans both streams."""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.has_biases)
        self.norm = QKNorm(config.head_width)
        self.proj = nn.Linear(config.width, config.width, bias=config.has_biases)

    def queries_keys_values(self, x_BTM: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return heads(self.qkv(x_BTM).chunk(3, dim=-1), self.norm, self.head_width, rope)


class Modulation(nn.Module):
    """Shift, scale and gate for each of several parts of a block."""

    def __init__(self, width: int, num_parts: int, bias: bool = True) -> None:
        super().__init__()
        self.num_rows = 3 * num_parts
        self.lin = nn.Linear(width, self.num_rows * width, bias=bias)

    def rows(self, vec_BM: Tensor) -> Tensor:
        """Return all rows, shape BVM."""
        rows_BVM: Tensor = self.lin(silu(vec_BM)).unflatten(-1, (self.num_rows, -1))
        return rows_BVM

    def forward(self, vec_BM: Tensor) -> tuple[Tensor, ...]:
        """Return each row as (B, 1, M)."""
        return torch.split(self.rows(vec_BM), 1, dim=1)


class GivenModulation(nn.Module):
    """A stand-in for `Modulation` without weights, which selects a block's rows from modulation computed elsewhere."""

    def __init__(self, first_row: int, num_rows: int) -> None:
        super().__init__()
        self.rows = slice(first_row, first_row + num_rows)

    def forward(self, rows_BVM: Tensor) -> tuple[Tensor, ...]:
        """Return each row as (B, 1, M)."""
        return torch.split(rows_BVM[:, self.rows], 1, dim=1)


class SwiGLU(nn.Module):
    """The SwiGLU activation (Shazeer 2020): the second half of the values, gated by SiLU of the first half."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


def num_mlp_inputs(config: StreamConfig) -> int:
    """Return the number of values that the MLP's activation takes: `mlp_width`, or twice as many if it is gated."""
    return config.mlp_width * (2 if config.is_gated else 1)


def make_activation(config: StreamConfig) -> nn.Module:
    return SwiGLU() if config.is_gated else nn.GELU(approximate="tanh")


def make_mlp(config: StreamConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.width, num_mlp_inputs(config), bias=config.has_biases),
        make_activation(config),
        nn.Linear(config.mlp_width, config.width, bias=config.has_biases),
    )


class DoubleStreamBlock(nn.Module):
    """A block of separate image and text streams that attend to each other. Network modules find its layers by this
    class name."""

    def __init__(self, config: StreamConfig, make_modulation: MakeModulation) -> None:
        super().__init__()
        self.img_mod = make_modulation(2, 0)
        self.img_attn = SelfAttention(config)
        self.img_mlp = make_mlp(config)
        # Rows 0 to 5 are shift, scale and gate of the image's two parts.
        self.txt_mod = make_modulation(2, 6)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = make_mlp(config)

    def forward(
        self, img_BTM: Tensor, txt_BLM: Tensor, vec: Tensor, rope: Rope, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod, num_text = self.img_mod(vec), self.txt_mod(vec), txt_BLM.shape[1]
        # Rotated before they are joined, in one pass with the norms.
        img_rope, txt_rope = rope[..., num_text:, :, :], rope[..., :num_text, :, :]
        img_qkv = self.img_attn.queries_keys_values(modulated_norm(img_BTM, *img_mod[:2]), img_rope)
        txt_qkv = self.txt_attn.queries_keys_values(modulated_norm(txt_BLM, *txt_mod[:2]), txt_rope)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        attended_BTM = attend(q, k, v, mask)
        img_BTM = gated_sum(img_BTM, img_mod[2], self.img_attn.proj(attended_BTM[:, num_text:]))
        img_BTM = gated_sum(img_BTM, img_mod[5], self.img_mlp(modulated_norm(img_BTM, *img_mod[3:5])))
        txt_BLM = gated_sum(txt_BLM, txt_mod[2], self.txt_attn.proj(attended_BTM[:, :num_text]))
        txt_BLM = gated_sum(txt_BLM, txt_mod[5], self.txt_mlp(modulated_norm(txt_BLM, *txt_mod[3:5])))
        return img_BTM, txt_BLM


class SingleStreamBlock(nn.Module):
    """A block with parallel attention and MLP over all tokens. Network modules find its layers by this class name."""

    def __init__(self, config: StreamConfig, make_modulation: MakeModulation) -> None:
        super().__init__()
        self.widths = [*3 * [config.width], num_mlp_inputs(config)]
        self.head_width = config.head_width
        self.linear1 = nn.Linear(config.width, sum(self.widths), bias=config.has_biases)
        self.linear2 = nn.Linear(config.width + config.mlp_width, config.width, bias=config.has_biases)
        self.norm = QKNorm(config.head_width)
        self.activation = make_activation(config)
        self.modulation = make_modulation(1, 0)

    def forward(self, x_BTM: Tensor, vec: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        mlp, q, k, v = self.parts(modulated_norm(x_BTM, shift, scale), rope)
        attended_BTM = attend(q, k, v, mask)
        del q, k, v  # attention keeps their rotated copies
        y_BTM: Tensor = self.linear2(torch.cat([attended_BTM, self.activation(mlp)], dim=-1))
        return gated_sum(x_BTM, gate, y_BTM)

    def parts(self, x_BTM: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the MLP's input, queries, keys and values."""
        *qkv, mlp = self.linear1(x_BTM).split(self.widths, dim=-1)
        q, k, v = heads(qkv, self.norm, self.head_width, rope)
        return owned(mlp), q, k, owned(v)


class LastModulation(nn.Sequential):
    """Shift and scale of the last layer."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, 2 * width, bias=bias))

    def forward(self, vec_BM: Tensor) -> tuple[Tensor, ...]:
        """Return (shift, scale), each (B, 1, M)."""
        parts: tuple[Tensor, ...] = self[1](self[0](vec_BM))[:, None].chunk(2, dim=-1)
        return parts


class LastLayer(nn.Module):
    """The last layer, which maps tokens to patches of the velocity."""

    def __init__(self, config: StreamConfig, modulation: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.in_features, bias=config.has_biases)
        self.adaLN_modulation = modulation

    def forward(self, x_BTM: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)
        patches_BTF: Tensor = self.linear(modulated_norm(x_BTM, shift, scale))
        return patches_BTF
