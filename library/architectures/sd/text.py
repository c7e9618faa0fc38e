"""Encoding of captions for Stable Diffusion 1.x and 2.x.

Shapes: B captions, L chunks, T the 77 positions of a chunk, W the width of the text encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from library.memory.devices import send
from library.models.clip.clip import clip_body
from library.models.clip.tokens import ChunkedText, emphasize, join_chunks
from library.types import Conditioning, Tokens


@dataclass(frozen=True)
class ClipText(ChunkedText):
    """The text pipeline of one CLIP encoder; captions longer than 75 tokens are encoded in chunks and joined."""

    clip_skip: int = 1  # 1: the last layer
    pad_id: int | None = None  # None: captions are padded with the end token

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return token IDs of shape (B, L, 77)."""
        ids_BLT, weights_BLT = self.tokens.tokenize(captions, self.pad_id)
        return Tokens((ids_BLT,), (weights_BLT,) if self.tokens.reads_emphasis else None)

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return {"hidden_state": (B, 77, W)}, or 152 or 227 positions with two or three chunks. Gradients flow."""
        (encoder,) = encoders
        body = clip_body(encoder)
        (ids_BLT,) = tokens.ids_BLT
        ids_NT = send(ids_BLT.flatten(0, 1), body.final_layer_norm.weight.device)
        if self.clip_skip == 1:
            hidden_NTW = encoder(ids_NT).last_hidden_state
        else:
            # Hidden states come without the last norm, which the U-Net was trained with.
            states = encoder(ids_NT, output_hidden_states=True).hidden_states
            hidden_NTW = body.final_layer_norm(states[-self.clip_skip])
        hidden_BLTW = hidden_NTW.unflatten(0, ids_BLT.shape[:2])
        weights_BLT = tokens.weights_BLT[0] if tokens.weights_BLT is not None else None
        return {"hidden_state": join_chunks(emphasize(hidden_BLTW, weights_BLT))}
