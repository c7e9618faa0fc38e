"""CLIP's tokenizer, loaded from beside the model, its own folder, or the hub."""

import logging
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models.tokenizer_files import BYTE_PAIR_FILES, TokenizerFiles, holds_byte_pairs, read_tokenizer_folder

logger = logging.getLogger(__name__)

TOKENIZER_HUB_NAME = "openai/clip-vit-large-patch14"
TOKENIZER = TokenizerFiles(TOKENIZER_HUB_NAME, (*BYTE_PAIR_FILES, "special_tokens_map.json"), holds_byte_pairs)


def load_tokenizer(model: Path, cache_dir: str | None, num_words: int | None) -> Any:
    """Load CLIP's tokenizer for the checkpoint at `model`, a file or folder whose text encoder has `num_words`
    embeddings.

    It is searched in tokenizer/ of the folder or beside the file, then in --tokenizer_cache_dir, then on the hub, from
    where it is saved into --tokenizer_cache_dir. Raises UserError saying which files to put where.
    """
    folder = find_tokenizer(model, cache_dir)
    logger.info("tokenizer: %s", folder)
    tokenizer = read_tokenizer_folder("CLIPTokenizerFast", folder)
    largest = max(tokenizer.get_vocab().values())
    if num_words is not None and largest >= num_words:
        raise UserError(
            f"the tokenizer in {folder} has token IDs up to {largest}, but the text encoder has {num_words} "
            f"embeddings: it belongs to another model than {model}; replace it with the right one"
        )
    return tokenizer


def find_tokenizer(model: Path, cache_dir: str | None) -> Path:
    """Find the folder of the tokenizer, downloading it if needed."""
    beside = (model if model.is_dir() else model.parent) / "tokenizer"
    try:
        return TOKENIZER.find([beside], cache_dir)
    except ConnectionError as error:
        raise UserError(
            f"{model} has no tokenizer, and {TOKENIZER_HUB_NAME} cannot be downloaded ({error}). Put "
            f"vocab.json and merges.txt (or tokenizer.json) of {TOKENIZER_HUB_NAME} into {beside}, or into "
            f"{TOKENIZER.cache_place(cache_dir)}"
        ) from error
