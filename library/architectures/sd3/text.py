"""Encoding of captions for Stable Diffusion 3.

Letters: B captions, T positions, W width of one text encoder, P width of its pooled features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.devices import send
from library.models.clip.clip import clip_body
from library.models.clip.tokens import OPEN_CLIP_PAD, ClipTokens
from library.models.t5 import count_t5_tokens, encode_t5, tokenize_t5
from library.types import Conditioning, Tokens

CLIP_PLACES = 77


@dataclass(frozen=True)
class Sd3Text:
    """The text pipeline of CLIP-L, CLIP-G and, with a tokenizer, T5; each encoder cuts captions at its own limit."""

    clip: ClipTokens
    t5_tokenizer: Any  # transformers' T5TokenizerFast; None without T5
    num_t5_tokens: int
    masks_clip: bool = False  # padding is not attended to
    masks_t5: bool = False

    @property
    def max_tokens(self) -> int:
        """The limit of the encoder that reads the most tokens, without T5's end token."""
        return self.clip.max_tokens if self.t5_tokenizer is None else max(self.clip.max_tokens, self.num_t5_tokens - 1)

    def count_tokens(self, caption: str) -> int:
        if self.t5_tokenizer is None or self.num_t5_tokens - 1 < self.clip.max_tokens:
            return len(self.clip.weigh_tokens(caption)[0])
        return count_t5_tokens(self.t5_tokenizer, caption)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return token IDs of shape (B, 1, 77) for CLIP-L and CLIP-G; (B, 1, T) for T5, and its mask, 0 for padding."""
        clip_l_ids, _ = self.clip.tokenize(captions)
        clip_g_ids, _ = self.clip.tokenize(captions, OPEN_CLIP_PAD)
        if self.t5_tokenizer is None:
            return Tokens((clip_l_ids, clip_g_ids))
        ids_BT, mask_BT = tokenize_t5(self.t5_tokenizer, captions, self.num_t5_tokens)
        return Tokens((clip_l_ids, clip_g_ids, ids_BT[:, None], mask_BT[:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return features under the names of the cache; gradients flow.

        "lg_out" (B, 77, W of both) are the states of both CLIPs before their last layers, without the last norm,
        concatenated. "lg_pooled" (B, P of both) are the projected states of the end token. "t5_out" (B, T, W) are T5's
        last states. The masks are 1 for tokens.
        """
        features = self.encode_clips(encoders, tokens)
        if self.t5_tokenizer is None:
            return features
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT[2:])
        t5_out = encode_t5(encoders[2], ids_BT, mask_BT if self.masks_t5 else None)
        return {**features, "t5_out": t5_out, "t5_attn_mask": send(mask_BT, t5_out.device)}

    def encode_clips(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return the features that need only CLIP-L and CLIP-G, the first two of `encoders`."""
        ids = [ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT[:2]]
        masks = [mask_to_end(ids_BT, self.clip.end_id) for ids_BT in ids]
        clips = [
            encode_clip(encoder, ids_BT, mask_BT if self.masks_clip else None)
            for encoder, ids_BT, mask_BT in zip(encoders[:2], ids, masks, strict=True)
        ]
        return {
            "lg_out": torch.cat([states for states, _ in clips], dim=-1),
            "lg_pooled": torch.cat([pooled for _, pooled in clips], dim=-1),
            "clip_l_attn_mask": send(masks[0], clips[0][0].device),
            "clip_g_attn_mask": send(masks[1], clips[1][0].device),
        }


def mask_to_end(ids_BT: Tensor, end_id: int) -> Tensor:
    """Return a mask that is 1 up to and including the first end token, 0 in the padding after it."""
    # CLIP-L is padded with the end token, so only the first one belongs to the caption.
    is_end_BT = (ids_BT == end_id).int()
    return ((is_end_BT.cumsum(dim=1) - is_end_BT) == 0).long()


def encode_clip(encoder: nn.Module, ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (states before the last layer, BTW; pooled features, BP)."""
    model: Any = encoder
    device = clip_body(encoder).final_layer_norm.weight.device
    mask_BT = None if mask_BT is None else send(mask_BT, device)
    outputs = model(send(ids_BT, device), attention_mask=mask_BT, output_hidden_states=True)
    return outputs.hidden_states[-2], outputs.text_embeds
