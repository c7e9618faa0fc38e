"""Encoding of captions for Z-Image: Qwen3's states of a caption as the message of a user.

Letters: B captions, T tokens of the longest, E width of the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.models.qwen3 import encode_before_last_layer
from library.types import Conditioning, Tokens

NUM_TOKENS = 512  # with the template
BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (f"{BEGIN}user\n", f"{END}\n{BEGIN}assistant\n")  # Qwen3's chat template with thinking enabled


@dataclass(frozen=True)
class ZImageText:
    """Qwen3's reading of a caption inside the chat template."""

    tokenizer: Any  # transformers' Qwen2Tokenizer, padding on the right

    @property
    def max_tokens(self) -> int:
        return NUM_TOKENS - self.count_tokens("".join(TEMPLATE))

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, verbose=False)["input_ids"])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return IDs and their mask, (B, 1, T), 0 for padding; a long caption is cut with the end of its template."""
        begin, end = TEMPLATE
        found = self.tokenizer(
            [f"{begin}{caption}{end}" for caption in captions],
            padding="longest",
            truncation=True,
            max_length=NUM_TOKENS,
            return_tensors="pt",
        )
        return Tokens((found["input_ids"][:, None].long(), found["attention_mask"][:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, T, E), "attention_mask": (B, T)}.

        The encoder runs in the precision it is stored in: its states overflow float16.
        """
        (encoder,) = encoders
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        with torch.autocast(next(encoder.parameters()).device.type, enabled=False):
            states_BTE = encode_before_last_layer(encoder, ids_BT, mask_BT)
        return {"hidden_state": states_BTE, "attention_mask": mask_BT}  # the mask is kept on the host
