"""Tokenization of captions for CLIP, in chunks of 75 tokens.

Shapes: B captions, L chunks, T the 77 positions of a chunk, W the width of a text encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from library.models.clip.emphasis import parse_emphasis

CHUNK_TOKENS = 75  # CLIP's 77 positions without the begin and end tokens
OPEN_CLIP_PAD = 0  # padding that OpenCLIP's models were trained with; OpenAI's repeat the end token
TextT = TypeVar("TextT", bound="ChunkedText")


@dataclass(frozen=True)
class ClipTokens:
    """Settings for tokenizing captions."""

    tokenizer: Any  # transformers' CLIPTokenizer
    num_chunks: int = 1
    reads_emphasis: bool = False

    @property
    def max_tokens(self) -> int:
        return CHUNK_TOKENS * self.num_chunks

    @property
    def end_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def weigh_tokens(self, caption: str) -> tuple[list[int], list[float]]:
        """Return all token IDs of a caption, without begin, end and padding, and the emphasis of each."""
        pieces = parse_emphasis(caption) if self.reads_emphasis else [(caption, 1.0)]
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            piece = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += piece
            weights += [weight] * len(piece)
        return ids, weights

    def tokenize(self, captions: Sequence[str], pad_id: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (token IDs, emphasis), both (B, L, 77): begin, up to 75 tokens, end, padding.

        `pad_id` None pads with the end token.
        """
        shape = (len(captions), self.num_chunks, CHUNK_TOKENS + 2)
        ids_BLT = torch.full(shape, self.end_id if pad_id is None else pad_id, dtype=torch.int64)
        ids_BLT[:, :, 0] = self.tokenizer.bos_token_id
        weights_BLT = torch.ones(shape)
        for b, caption in enumerate(captions):
            ids, weights = self.weigh_tokens(caption)
            for n in range(self.num_chunks):
                part = slice(n * CHUNK_TOKENS, (n + 1) * CHUNK_TOKENS)
                end = 1 + len(ids[part])
                ids_BLT[b, n, 1:end] = torch.tensor(ids[part], dtype=torch.int64)
                ids_BLT[b, n, end] = self.end_id
                weights_BLT[b, n, 1:end] = torch.tensor(weights[part])
        return ids_BLT, weights_BLT


@dataclass(frozen=True)
class ChunkedText:
    """The common part of the U-Net models' text pipelines: captions are encoded in chunks of 75 tokens and joined."""

    tokens: ClipTokens

    @property
    def tokenizer(self) -> Any:
        """transformers' CLIPTokenizer."""
        return self.tokens.tokenizer

    def with_emphasis(self: TextT) -> TextT:
        """Return a copy of this text pipeline that reads emphasis, as prompts always do."""
        return replace(self, tokens=replace(self.tokens, reads_emphasis=True))

    @property
    def max_tokens(self) -> int:
        return self.tokens.max_tokens

    def count_tokens(self, caption: str) -> int:
        return len(self.tokens.weigh_tokens(caption)[0])


def join_chunks(hidden_BLTW: Tensor) -> Tensor:
    """Join chunks (B, L, 77, W) into (B, 75 L + 2, W): first begin token, tokens of all chunks, last end token."""
    first_B1W, last_B1W = hidden_BLTW[:, 0, :1], hidden_BLTW[:, -1, -1:]
    return torch.cat([first_B1W, hidden_BLTW[:, :, 1:-1].flatten(1, 2), last_B1W], dim=1)


def emphasize(hidden_BLTW: Tensor, weights_BLT: Tensor | None) -> Tensor:
    """Multiply every position by its emphasis; with `weights_BLT` None return the states unchanged."""
    return hidden_BLTW if weights_BLT is None else hidden_BLTW * weights_BLT.to(hidden_BLTW).unsqueeze(-1)
