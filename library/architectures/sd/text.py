"""Captions to the conditioning of Stable Diffusion 1.x.

Shapes: B captions, L chunks, T the 77 positions of a chunk, W the width of the text encoder.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.sd.emphasis import parse_emphasis
from library.architectures.sd.load import clip_body
from library.architectures.sd.sources import fetch_snapshot
from library.types import Conditioning, Tokens

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 75  # of a caption in one chunk; with begin and end these are CLIP's 77 positions
TOKENIZER_HUB_NAME = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


@dataclass(frozen=True)
class ClipText:
    """One CLIP text encoder; captions longer than 75 tokens are encoded in chunks and joined."""

    tokenizer: Any  # transformers' CLIPTokenizer
    num_chunks: int = 1
    clip_skip: int = 1  # 1: the last layer
    reads_emphasis: bool = False

    @property
    def max_tokens(self) -> int:
        return CHUNK_TOKENS * self.num_chunks

    def count_tokens(self, caption: str) -> int:
        return len(self.weigh_tokens(caption)[0])

    def weigh_tokens(self, caption: str) -> tuple[list[int], list[float]]:
        """All token ids of a caption, without begin, end and padding, and the emphasis of each."""
        pieces = parse_emphasis(caption) if self.reads_emphasis else [(caption, 1.0)]
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            piece = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += piece
            weights += [weight] * len(piece)
        return ids, weights

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Token ids of shape (B, L, 77): a chunk begins with the begin token and is filled up with the end token."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        shape = (len(captions), self.num_chunks, CHUNK_TOKENS + 2)
        ids_BLT = torch.full(shape, end, dtype=torch.int64)
        ids_BLT[:, :, 0] = begin
        weights_BLT = torch.ones(shape)
        for b, caption in enumerate(captions):
            ids, weights = self.weigh_tokens(caption)
            for n in range(self.num_chunks):
                part = slice(n * CHUNK_TOKENS, (n + 1) * CHUNK_TOKENS)
                num_tokens = len(ids[part])
                ids_BLT[b, n, 1 : 1 + num_tokens] = torch.tensor(ids[part], dtype=torch.int64)
                weights_BLT[b, n, 1 : 1 + num_tokens] = torch.tensor(weights[part])
        return Tokens((ids_BLT,), (weights_BLT,) if self.reads_emphasis else None)

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """{"hidden_state": (B, 77, W)}, or 152 or 227 positions with two or three chunks. Gradients flow."""
        (encoder,) = encoders
        body = clip_body(encoder)
        (ids_BLT,) = tokens.ids_BLT
        ids_NT = ids_BLT.flatten(0, 1).to(body.final_layer_norm.weight.device)
        if self.clip_skip == 1:
            hidden_NTW = encoder(ids_NT).last_hidden_state
        else:
            states = encoder(ids_NT, output_hidden_states=True).hidden_states
            hidden_NTW = body.final_layer_norm(states[-self.clip_skip])
        hidden_BLTW = hidden_NTW.unflatten(0, ids_BLT.shape[:2])
        if tokens.weights_BLT is not None:
            hidden_BLTW = hidden_BLTW * tokens.weights_BLT[0].to(hidden_BLTW).unsqueeze(-1)
        return {"hidden_state": join_chunks(hidden_BLTW)}


def join_chunks(hidden_BLTW: Tensor) -> Tensor:
    """(B, L, 77, W) to (B, 75 L + 2, W): the first begin, every chunk's tokens, the last end."""
    first_B1W, last_B1W = hidden_BLTW[:, 0, :1], hidden_BLTW[:, -1, -1:]
    return torch.cat([first_B1W, hidden_BLTW[:, :, 1:-1].flatten(1, 2), last_B1W], dim=1)


def load_tokenizer(model: Path, cache_dir: str | None, num_words: int) -> Any:
    """CLIP's tokenizer for the checkpoint at `model`, a folder or a single file; its text encoder knows `num_words`.

    Looked for in tokenizer/ of the folder or beside the file, then in --tokenizer_cache_dir, then on the hub, from
    where it is saved into --tokenizer_cache_dir. Raises ValueError saying what to put where.
    """
    from transformers import CLIPTokenizer

    folder = find_tokenizer(model, cache_dir)
    logger.info("tokenizer: %s", folder)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_words:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {largest}, the text encoder knows {num_words} words: "
            f"it belongs to another model than {model}; put the right one into its place"
        )
    return tokenizer


def find_tokenizer(model: Path, cache_dir: str | None) -> Path:
    """The folder of the tokenizer, downloaded if need be."""
    beside = (model if model.is_dir() else model.parent) / "tokenizer"
    cached = Path(cache_dir).expanduser() / TOKENIZER_HUB_NAME.replace("/", "_") if cache_dir else None
    for folder in (beside, cached):
        if folder is not None and holds_tokenizer(folder):
            return folder
    try:
        downloaded = fetch_snapshot(TOKENIZER_HUB_NAME, TOKENIZER_FILES)
    except ConnectionError as error:
        cached_name = cached or f"<folder>/{TOKENIZER_HUB_NAME.replace('/', '_')}"
        raise ValueError(
            f"{model} has no tokenizer, and {TOKENIZER_HUB_NAME} cannot be downloaded ({error}). Put "
            f"vocab.json and merges.txt (or tokenizer.json) of {TOKENIZER_HUB_NAME} into {beside}, or into "
            f"{cached_name} {'' if cached else 'and give --tokenizer_cache_dir <folder>'}".rstrip()
        ) from error
    if cached is not None:
        cached.mkdir(parents=True, exist_ok=True)
        for file in downloaded.iterdir():
            shutil.copyfile(file, cached / file.name)
    return downloaded


def holds_tokenizer(folder: Path) -> bool:
    """Whether CLIP's tokenizer can be made from the files of a folder."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names
