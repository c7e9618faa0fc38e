"""CLIP's tokenizer, loaded from next to the model, from --tokenizer_cache_dir or from the hub."""

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

    Searches tokenizer/ in the folder or next to the file, then --tokenizer_cache_dir, then the hub; a download is saved
    into --tokenizer_cache_dir. Raises UserError naming the files to provide, or for the tokenizer of another model.
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
    tokenizer_folder = (model if model.is_dir() else model.parent) / "tokenizer"
    try:
        return TOKENIZER.find([tokenizer_folder], cache_dir)
    except ConnectionError as error:
        raise UserError(
            f"{model} has no tokenizer, and {TOKENIZER_HUB_NAME} cannot be downloaded ({error}). Put "
            f"vocab.json and merges.txt (or tokenizer.json) of {TOKENIZER_HUB_NAME} into {tokenizer_folder}, or into "
            f"{TOKENIZER.cache_place(cache_dir)}"
        ) from error
