"""Text conditioning of Knots. Letters: B captions, T bytes, M width."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from library.memory.devices import send
from library.types import Conditioning, Tokens


@dataclass(frozen=True)
class ByteText:
    """A tokenizer whose tokens are bytes, padded with zeros."""

    max_tokens: int

    def count_tokens(self, caption: str) -> int:
        return len(caption.encode())

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        rows = [caption.encode()[: self.max_tokens].ljust(self.max_tokens, b"\0") for caption in captions]
        return Tokens((torch.tensor([list(row) for row in rows]),))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"text": (B, T, M)}; gradients flow."""
        (encoder,) = encoders
        (ids_BT,) = tokens.ids_BLT
        return {"text": encoder(send(ids_BT, next(encoder.parameters()).device))}
