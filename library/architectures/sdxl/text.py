"""Encoding of captions for Stable Diffusion XL.

Shapes: B captions, L chunks, T the 77 positions of a chunk, N = B L, W the width of a text encoder, P of the
projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from library.models.clip.clip import hidden_states, pool_at_end
from library.models.clip.tokens import OPEN_CLIP_PAD, ChunkedText, emphasize, join_chunks
from library.types import Conditioning, Tokens

CACHE_KEYS = ("hidden_state1", "hidden_state2", "pool2")


@dataclass(frozen=True)
class SdxlText(ChunkedText):
    """The text pipeline of CLIP-L and OpenCLIP's bigG, which share a vocabulary; captions longer than 75 tokens are
    encoded in chunks and joined."""

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return token IDs of shape (B, L, 77) for each encoder: the first is padded with the end token, the second
        with 0."""
        ids1_BLT, weights_BLT = self.tokens.tokenize(captions)
        ids2_BLT, _ = self.tokens.tokenize(captions, OPEN_CLIP_PAD)
        return Tokens((ids1_BLT, ids2_BLT), (weights_BLT,) * 2 if self.tokens.reads_emphasis else None)

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return hidden_state1 (B, 77, W1), hidden_state2 (B, 77, W2) and pool2 (B, P); gradients flow.

        Both states are those before the last layer, without a final norm. The pooled vector is that of the first chunk,
        without emphasis. With two or three chunks there are 152 or 227 positions.
        """
        encoder1, encoder2 = encoders
        ids1_BLT, ids2_BLT = tokens.ids_BLT
        weights1_BLT, weights2_BLT = tokens.weights_BLT or (None, None)
        states1, _ = hidden_states(encoder1, ids1_BLT.flatten(0, 1))
        states2, normed_NTW = hidden_states(encoder2, ids2_BLT.flatten(0, 1))
        projection = encoder2.text_projection
        assert isinstance(projection, nn.Module)
        first_BTW = normed_NTW[:: ids2_BLT.shape[1]]
        return {
            "hidden_state1": concatenate_chunks(states1[-2], ids1_BLT, weights1_BLT),
            "hidden_state2": concatenate_chunks(states2[-2], ids2_BLT, weights2_BLT),
            "pool2": pool_at_end(first_BTW, ids2_BLT[:, 0], self.tokens.end_id, projection),
        }


def concatenate_chunks(hidden_NTW: Tensor, ids_BLT: Tensor, weights_BLT: Tensor | None) -> Tensor:
    """Join the chunks of each caption into one sequence, weighted by its emphasis."""
    hidden_BLTW = hidden_NTW.reshape(*ids_BLT.shape[:2], *hidden_NTW.shape[1:])
    return join_chunks(emphasize(hidden_BLTW, weights_BLT))
