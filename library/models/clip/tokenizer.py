"""CLIP's tokenizer, loaded from next to the model, from --tokenizer_cache_dir or from the hub."""

from pathlib import Path
from typing import Any

from library.models.tokenizer_files import BYTE_PAIR_FILES, TokenizerFiles, holds_byte_pairs

TOKENIZER = TokenizerFiles(
    "openai/clip-vit-large-patch14",
    (*BYTE_PAIR_FILES, "special_tokens_map.json"),
    holds_byte_pairs,
    "CLIP",
    "vocab.json and merges.txt (or tokenizer.json)",
    "CLIPTokenizerFast",
)


def load_tokenizer(model: Path, cache_dir: str | None, num_words: int | None) -> Any:
    """Load CLIP's tokenizer for the checkpoint at `model`, a file or folder whose text encoder has `num_words`
    embeddings. It is looked for in tokenizer/ in the folder or next to the file, then as by `TokenizerFiles.load`."""
    return TOKENIZER.load([(model if model.is_dir() else model.parent) / "tokenizer"], cache_dir, num_words)
