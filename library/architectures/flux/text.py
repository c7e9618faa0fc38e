"""Encoding of captions for FLUX.1: CLIP-L's pooled state and T5-XXL's states; for Chroma only the latter.

Letters: B captions, T T5's tokens, W width of an encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.memory.devices import send
from library.models.clip.tokens import ClipTokens
from library.models.t5 import count_t5_tokens, encode_t5, tokenize_t5
from library.types import Conditioning, Tokens


@dataclass(frozen=True)
class T5Text:
    """The text pipeline of T5."""

    tokenizer: Any  # transformers' T5TokenizerFast
    num_tokens: int
    masks_padding: bool  # T5 does not attend to caption padding

    @property
    def max_tokens(self) -> int:
        return self.num_tokens - 1  # without the end token

    def count_tokens(self, caption: str) -> int:
        return count_t5_tokens(self.tokenizer, caption)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return T5's IDs (B, 1, T) and their mask (B, 1, T), 0 for padding."""
        ids_BT, mask_BT = tokenize_t5(self.tokenizer, captions, self.num_tokens)
        return Tokens((ids_BT[:, None], mask_BT[:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"t5_out": (B, T, W), "t5_attn_mask": (B, T)}. Gradients flow."""
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        t5_out = encode_t5(encoders[0], ids_BT, mask_BT if self.masks_padding else None)
        return {"t5_out": t5_out, "t5_attn_mask": send(mask_BT, t5_out.device)}


@dataclass(frozen=True)
class FluxText:
    """The text pipeline of FLUX.1: CLIP-L and T5. T5 reads more of a caption, so it determines the token limit."""

    clip: ClipTokens
    t5: T5Text

    @property
    def max_tokens(self) -> int:
        return self.t5.max_tokens

    def count_tokens(self, caption: str) -> int:
        return self.t5.count_tokens(caption)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return CLIP's IDs (B, 1, 77), T5's IDs (B, 1, T) and their mask (B, 1, T), 0 for padding."""
        return Tokens((self.clip.tokenize(captions)[0], *self.t5.tokenize(captions).ids_BLT))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"l_pooled": (B, W), "t5_out": (B, T, W), "t5_attn_mask": (B, T)}. Gradients flow."""
        # T5's pipeline expects its encoder and its IDs first, as for Chroma.
        t5_features = self.t5.encode(encoders[1:], Tokens(tokens.ids_BLT[1:]))
        return {**self.encode_clip(encoders, tokens), **t5_features}

    def encode_clip(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"l_pooled": (B, W)}, which needs only CLIP-L, the first of `encoders`. Gradients flow."""
        clip = encoders[0]
        device = next(clip.parameters()).device
        return {"l_pooled": clip(send(tokens.ids_BLT[0][:, 0], device)).pooler_output}
