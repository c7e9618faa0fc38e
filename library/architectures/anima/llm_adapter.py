"""The text adapter in Anima's checkpoint, which makes the denoiser's text features from T5 tokens and Qwen3's states.

Module paths are the keys of the checkpoint below "llm_adapter". Letters: B samples, L T5 tokens, S Qwen3 tokens, E
width, N heads, D head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from library.architectures.anima.positions import Angles, apply_rope, text_angles
from library.models.rotary import AxisTables

EPS = 1e-6
MIN_TOKENS = 512  # the denoiser attends to at least this many; shorter captions are padded with zeros


@dataclass(frozen=True)
class AdapterConfig:
    """The hyper-parameters of the adapter, inferred from the shapes of a checkpoint."""

    num_words: int
    width: int
    source_width: int  # of Qwen3's states
    head_width: int
    mlp_width: int
    num_blocks: int


class Attention(nn.Module):
    """Attention to the tokens themselves or to a context, with normalized q and k; `output` names the last layer."""

    def __init__(self, width: int, context_width: int, head_width: int, output: str) -> None:
        super().__init__()
        self.head_width = head_width
        self.output = output
        self.q_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(head_width, eps=EPS)
        self.k_proj = nn.Linear(context_width, width, bias=False)
        self.k_norm = nn.RMSNorm(head_width, eps=EPS)
        self.v_proj = nn.Linear(context_width, width, bias=False)
        self.add_module(output, nn.Linear(width, width, bias=False))

    def forward(
        self,
        x_BTE: Tensor,
        context: Tensor,
        angles: Angles | None,
        context_angles: Angles | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        heads = (-1, self.head_width)
        q_BNTD = self.q_norm(self.q_proj(x_BTE).unflatten(-1, heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(context).unflatten(-1, heads)).transpose(1, 2)
        v = self.v_proj(context).unflatten(-1, heads).transpose(1, 2)
        if angles is not None and context_angles is not None:
            q_BNTD, k = apply_rope(q_BNTD, angles), apply_rope(k, context_angles)
        attended = scaled_dot_product_attention(q_BNTD, k, v, attn_mask=mask)
        y_BTE: Tensor = getattr(self, self.output)(attended.transpose(1, 2).flatten(2))
        return y_BTE


class LLMAdapterTransformerBlock(nn.Module):
    """Self-attention of T5 tokens, then cross-attention to Qwen3's states. Network modules find the layers by this
    class name."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        c = config
        self.norm_self_attn = nn.RMSNorm(c.width, eps=EPS)
        self.self_attn = Attention(c.width, c.width, c.head_width, "o_proj")
        self.norm_cross_attn = nn.RMSNorm(c.width, eps=EPS)
        self.cross_attn = Attention(c.width, c.source_width, c.head_width, "o_proj")
        self.norm_mlp = nn.RMSNorm(c.width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(c.width, c.mlp_width), nn.GELU(), nn.Linear(c.mlp_width, c.width))

    def forward(
        self,
        x_BLE: Tensor,
        source_BSE: Tensor,
        mask_B11L: Tensor,
        source_mask_B11S: Tensor,
        angles: Angles,
        source_angles: Angles,
    ) -> Tensor:
        y_BLE = self.norm_self_attn(x_BLE)
        x_BLE = x_BLE + self.self_attn(y_BLE, y_BLE, angles, angles, mask_B11L)
        x_BLE = x_BLE + self.cross_attn(
            self.norm_cross_attn(x_BLE), source_BSE, angles, source_angles, source_mask_B11S
        )
        after_BLE: Tensor = x_BLE + self.mlp(self.norm_mlp(x_BLE))
        return after_BLE


class LLMAdapter(nn.Module):
    """The network that maps Qwen3's states and T5's token IDs to the denoiser's text features."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.tables = AxisTables()
        self.embed = nn.Embedding(config.num_words, config.width)
        self.blocks = nn.ModuleList(LLMAdapterTransformerBlock(config) for _ in range(config.num_blocks))
        self.out_proj = nn.Linear(config.width, config.width)
        self.norm = nn.RMSNorm(config.width, eps=EPS)

    def forward(self, source_BSE: Tensor, source_mask_BS: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return text features, (B, max(L, 512), E), zero where `mask_BL` is 0.

        `source_BSE` must be zero where its mask is 0.
        """
        x_BLE = self.embed(ids_BL)
        head_width, device = self.config.head_width, x_BLE.device
        angles = text_angles(self.tables, head_width, ids_BL.shape[1], device)
        source_angles = text_angles(self.tables, head_width, source_BSE.shape[1], device)
        mask, source_mask = make_attention_mask(mask_BL), make_attention_mask(source_mask_BS)
        for block in self.blocks:
            x_BLE = block(x_BLE, source_BSE, mask, source_mask, angles, source_angles)
        x_BLE = self.norm(self.out_proj(x_BLE)) * mask_BL[..., None].to(x_BLE.dtype)
        return pad(x_BLE, (0, 0, 0, max(MIN_TOKENS - x_BLE.shape[1], 0)))


def make_attention_mask(mask_BT: Tensor) -> Tensor:
    """Return the mask of keys, shape (B, 1, 1, T)."""
    # A caption without any token attends to all of its padding. Qwen3's states are zero there and contribute nothing,
    # while a softmax over no token at all is NaN.
    is_token = mask_BT.bool()
    return torch.where(is_token.any(dim=-1, keepdim=True), is_token, True)[:, None, None]
