"""Encoding of captions for HunyuanImage 2.1: Qwen2.5-VL reads everything, ByT5 only text to be rendered.

Letters: B captions, T tokens of the longest, G glyph tokens, E width of an encoder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.hunyuan_image.qwen import NUM_TEMPLATE_TOKENS, encode_qwen, tokenize_qwen
from library.memory.devices import send
from library.models.t5 import encode_t5, tokenize_t5
from library.types import Conditioning, Tokens

MAX_TOKENS = 1024  # for a caption and the end of its template
NUM_GLYPH_TOKENS = 128
QUOTED = re.compile('"(.*?)"|\u2018(.*?)\u2019|\u201c(.*?)\u201d')
"""Straight double, curly single and curly double quotes. Straight single quotes are mostly apostrophes."""


def glyph_text(caption: str) -> str | None:
    """Return ByT5's text for a caption: `Text "..."` and a full stop for each quoted part; None without quotes."""
    quotes = ["".join(groups) for groups in QUOTED.findall(caption)]
    return "".join(f'Text "{quote}". ' for quote in quotes) or None


@dataclass(frozen=True)
class HunyuanImageText:
    qwen_tokenizer: Any  # transformers' Qwen2Tokenizer
    byt5_tokenizer: Any  # transformers' ByT5Tokenizer: bytes, so it needs no file

    @property
    def max_tokens(self) -> int:
        return MAX_TOKENS - 1  # without the end of the template

    def count_tokens(self, caption: str) -> int:
        return len(self.qwen_tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return Qwen's IDs and mask, (B, 1, T), and ByT5's, (B, 1, G); without quotes ByT5's mask is all 0."""
        ids_BT, mask_BT = tokenize_qwen(self.qwen_tokenizer, captions, MAX_TOKENS)
        glyphs = [glyph_text(caption) for caption in captions]
        glyph_ids_BG, glyph_mask_BG = tokenize_t5(
            self.byt5_tokenizer, [text or "" for text in glyphs], NUM_GLYPH_TOKENS
        )
        is_quoted_B1 = torch.tensor([[text is not None] for text in glyphs])
        glyph_mask_BG = glyph_mask_BG * is_quoted_B1
        return Tokens(tuple(ids[:, None] for ids in (ids_BT, mask_BT, glyph_ids_BG, glyph_mask_BG)))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"vlm_embed": (B, T - 34, E), "vlm_mask": (B, T - 34), "byt5_embed": (B, G, E), "byt5_mask": (B, G),
        "ocr_mask": (B,)}.

        "ocr_mask" is true for captions with quotes; without them ByT5's states are 0.
        """
        qwen, byt5 = encoders
        ids_BT, mask_BT, glyph_ids_BG, glyph_mask_BG = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        device = next(qwen.parameters()).device
        # Qwen's states overflow float16.
        with torch.autocast(device.type, enabled=False):
            states_BTE = encode_qwen(qwen, ids_BT, mask_BT)
            glyphs_BGE = encode_glyphs(byt5, glyph_ids_BG, glyph_mask_BG)
        return {
            "vlm_embed": states_BTE,
            "vlm_mask": send(mask_BT[:, NUM_TEMPLATE_TOKENS:], device),
            "byt5_embed": glyphs_BGE,
            "byt5_mask": send(glyph_mask_BG, device),
            "ocr_mask": send(glyph_mask_BG.any(dim=1), device),
        }


def encode_glyphs(encoder: nn.Module, ids_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """Return ByT5's states, BGE. Captions with an empty mask get 0, and the encoder is not run for them."""
    weight = next(encoder.parameters())
    width: int = encoder.config.d_model  # type: ignore[union-attr,assignment]
    states_BGE = weight.new_zeros(*ids_BG.shape, width)
    quoted_B = mask_BG.any(dim=1)
    if quoted_B.any():
        states_BGE[quoted_B.to(weight.device)] = encode_t5(encoder, ids_BG[quoted_B], mask_BG[quoted_B])
    return states_BGE
