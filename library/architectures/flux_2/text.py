"""Encoding of captions for FLUX.2: three states of a language model for a caption inside its chat template.

Letters: B captions, T tokens, E width of the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.flux_2.releases import TextEncoder
from library.models.language_models import encode_layers
from library.types import Conditioning, Tokens

NUM_TOKENS = 512  # with the template and padding, all of which the denoiser attends to


@dataclass(frozen=True)
class Flux2Text:
    """A language model's reading of a caption inside the chat template."""

    encoder: TextEncoder
    tokenizer: Any  # transformers', padding where the encoder was trained with it

    @property
    def max_tokens(self) -> int:
        return NUM_TOKENS - self.count_tokens("".join(self.encoder.template))

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return IDs and their mask, (B, 1, 512), 0 for padding; a long caption is cut with the end of its template."""
        begin, end = self.encoder.template
        removed = self.encoder.removed
        found = self.tokenizer(
            [f"{begin}{caption.replace(removed, '') if removed else caption}{end}" for caption in captions],
            add_special_tokens=False,
            padding="max_length",
            truncation=True,
            max_length=NUM_TOKENS,
            return_tensors="pt",
        )
        return Tokens((found["input_ids"][:, None].long(), found["attention_mask"][:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, 512, E)}, of padding too: it attends to the caption, and the denoiser to it.

        The encoder runs in the precision it is stored in: its states overflow float16.
        """
        (encoder,) = encoders
        ids_BT, mask_BT = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        with torch.autocast(next(encoder.parameters()).device.type, enabled=False):
            return {"hidden_state": encode_layers(encoder, ids_BT, mask_BT, self.encoder.layers)}
