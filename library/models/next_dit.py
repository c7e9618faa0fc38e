"""The layers of NextDiT (Qin et al. 2025), in the layout of the original checkpoints.

Letters: B samples, L text tokens, I image tokens, T tokens, N heads, M model width, V width of the noise level's
embedding, F features of a patch.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from library.models.rotary import Rope, turn
from library.models.sinusoids import FREQUENCIES, sinusoids
from library.types import Batch, Conditioning, Noised

EPS, FINAL_EPS = 1e-5, 1e-6


class BlockSizes(Protocol):
    """The hyper-parameters of a block."""

    @property
    def width(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity in the shape of the latents; for these models it is latent - noise, and time runs that way
    too."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW, 1 - noised.sigmas_B, conditioning["hidden_state"], conditioning["attention_mask"]
    )
    return velocity_BCHW


def key_mask(is_text_BL: Tensor, num_patches: int) -> Tensor:
    """Return the mask of tokens that may be attended to: the text's as given, the whole image; shape (B, 1, 1, T)."""
    image_BI = is_text_BL.new_ones((len(is_text_BL), num_patches))
    return torch.cat([is_text_BL, image_BI], dim=1)[:, None, None]


class TimestepEmbedder(nn.Module):
    """An embedding of the time as cosines and sines of decreasing frequencies, then two layers."""

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or width
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, times_B: Tensor, dtype: torch.dtype) -> Tensor:
        embedding_BV: Tensor = self.mlp(sinusoids(times_B).to(dtype))
        return embedding_BV


class JointAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: BlockSizes) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, eps=EPS)
        self.k_norm = nn.RMSNorm(config.head_width, eps=EPS)

    def forward(self, x_BTM: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x_BTM).unflatten(-1, (-1, self.head_width)).transpose(1, 2).split(self.heads, dim=1)
        # Norms and attention save inputs for the backward pass; a view would keep queries, keys and values alive.
        norms = ((self.q_norm, q.contiguous()), (self.k_norm, k.contiguous()))
        q, k = (turn(norm(part), rope).to(v.dtype) for norm, part in norms)
        if (repeats := self.heads[0] // self.heads[1]) > 1:
            k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        else:
            v = v.contiguous()
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y_BTM: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return y_BTM


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM: Tensor = self.w2(silu(self.w1(x_BTM)) * self.w3(x_BTM))
        return y_BTM


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward layer, each between two norms. Network modules find the layers by this class name.

    With a `modulation`, from V to four times M, the noise level scales the inputs and gates the outputs.
    """

    def __init__(self, config: BlockSizes, modulation: nn.Sequential | None = None) -> None:
        super().__init__()
        self.attention = JointAttention(config)
        self.feed_forward = FeedForward(config.width, config.mlp_width)
        self.attention_norm1 = nn.RMSNorm(config.width, eps=EPS)
        self.ffn_norm1 = nn.RMSNorm(config.width, eps=EPS)
        self.attention_norm2 = nn.RMSNorm(config.width, eps=EPS)
        self.ffn_norm2 = nn.RMSNorm(config.width, eps=EPS)
        self.adaLN_modulation = modulation

    def forward(self, x_BTM: Tensor, time_BV: Tensor | None, rope: Rope, mask: Tensor | None) -> Tensor:
        scale_attention, gate_attention, scale_mlp, gate_mlp = self.modulation(time_BV)
        attended = self.attention(self.attention_norm1(x_BTM) * scale_attention, rope, mask)
        x_BTM = x_BTM + gate_attention * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x_BTM) * scale_mlp)
        after_BTM: Tensor = x_BTM + gate_mlp * self.ffn_norm2(fed)
        return after_BTM

    def modulation(self, time_BV: Tensor | None) -> tuple[Tensor | float, ...]:
        """Return scale and gate of attention, then of the feed-forward layer, each (B, 1, M), or 1 without
        modulation."""
        if self.adaLN_modulation is None:
            return (1.0,) * 4
        scale_1, gate_1, scale_2, gate_2 = self.adaLN_modulation(time_BV)[:, None].chunk(4, dim=-1)
        return 1 + scale_1, gate_1.tanh(), 1 + scale_2, gate_2.tanh()


class FinalLayer(nn.Module):
    """The last layer, from tokens to patches of the velocity. Network modules find the layers by this class name."""

    def __init__(self, width: int, time_width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=FINAL_EPS)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_width, width))

    def forward(self, x_BIM: Tensor, time_BV: Tensor) -> Tensor:
        scale_B1M = self.adaLN_modulation(time_BV)[:, None]
        patches_BIF: Tensor = self.linear(self.norm_final(x_BIM) * (1 + scale_B1M))
        return patches_BIF
