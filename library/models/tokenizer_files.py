"""Location of a tokenizer's files: next to a model, in --tokenizer_cache_dir, or on the hub."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.atomic_files import copy_atomically
from library.base.errors import UserError, error_in
from library.base.json_text import parse_json
from library.checkpoints.model_lookup import fetch_snapshot

logger = logging.getLogger(__name__)

BYTE_PAIR_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class TokenizerFiles:
    hub_name: str
    files: tuple[str, ...]  # files to download from the repository
    are_in: Callable[[Path], bool]  # returns True if a folder has the tokenizer
    owner: str  # the text encoder, in messages
    needed: str  # the files to put into a folder, in messages
    kind: str  # transformers' tokenizer class

    def cache_folder(self, cache_dir: str | None) -> Path | None:
        """Return the subfolder of --tokenizer_cache_dir for the files; None if the option is not set."""
        return Path(cache_dir).expanduser() / self.hub_name.replace("/", "_") if cache_dir else None

    def cache_place(self, cache_dir: str | None) -> str:
        """Describe that folder for a message, which also asks for --tokenizer_cache_dir if it is not set."""
        cached = self.cache_folder(cache_dir)
        name = self.hub_name.replace("/", "_")
        return str(cached) if cached else f"<folder>/{name} and give --tokenizer_cache_dir <folder>"

    def find(self, folders: Sequence[Path], cache_dir: str | None) -> Path:
        """Return the first of `folders` with the files, else the cache folder, else a download, copied into the cache
        folder.

        Raises ConnectionError with the reason if the hub does not provide them.
        """
        cached = self.cache_folder(cache_dir)
        for folder in (*folders, *([cached] if cached else [])):
            if self.are_in(folder):
                return folder
        downloaded = fetch_snapshot(self.hub_name, self.files)
        if cached is not None:
            for name in self.files:
                if (downloaded / name).is_file():
                    # Whole or not at all: the next start would find a file that was cut off before it asks the hub.
                    copy_atomically(downloaded / name, cached / name)
        return downloaded

    def load(self, folders: Sequence[Path], cache_dir: str | None, num_words: int | None, **options: Any) -> Any:
        """Load the tokenizer of a text encoder with `num_words` embeddings.

        Searches `folders`, then --tokenizer_cache_dir, then the hub; a download is saved into --tokenizer_cache_dir.
        Raises UserError naming the files to provide, or for the tokenizer of another model.
        """
        try:
            folder = self.find(folders, cache_dir)
        except ConnectionError as error:
            raise UserError(
                f"{self.owner}'s tokenizer is in none of {', '.join(map(str, folders))}, and {self.hub_name} cannot be "
                f"downloaded ({error}). Put {self.needed} of {self.hub_name} into one of them, or into "
                f"{self.cache_place(cache_dir)}"
            ) from error
        logger.info("%s tokenizer: %s", self.owner, folder)
        tokenizer = read_tokenizer_folder(self.kind, folder, **options)
        check_ids(self.owner, tokenizer, folder, num_words)
        return tokenizer


def holds_byte_pairs(folder: Path) -> bool:
    """Return True if a folder has the files of a byte-pair tokenizer, such as CLIP's and Qwen's."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def read_tokenizer(read: Callable[[], Any], place: Path) -> Any:
    """Return `read()`. Raises UserError naming `place` if the tokenizer's files there are damaged."""
    try:
        return read()
    except Exception as error:  # transformers and tokenizers raise anything for damaged files, also bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise error_in(path=place)(
            f"the tokenizer {place} cannot be read ({reason})", "download its files again"
        ) from error


def read_tokenizer_folder(kind: str, folder: Path, **options: Any) -> Any:
    """Read a tokenizer of the transformers class `kind`, whose name ends in "Fast".

    Fast tokenizers can read tokenizer.json alone; transformers 4 also has slow ones, which cannot. Raises UserError
    naming the folder if a file in it is damaged.
    """
    import transformers

    def read() -> Any:
        extra_tokens = {} if transformers.__version__.split(".")[0] >= "5" else tokens_for_transformers_4(folder)
        return getattr(transformers, kind).from_pretrained(
            str(folder), local_files_only=True, **extra_tokens, **options
        )

    return read_tokenizer(read, folder)


def tokens_for_transformers_4(folder: Path) -> dict[str, Any]:
    """Return arguments with which transformers 4 reads the extra special tokens that transformers 5 saved.

    Transformers 5 saves a list, where 4 expects names.
    """
    config = folder / "tokenizer_config.json"
    values = parse_json(config.read_text("utf-8")) if config.is_file() else {}
    extra = values.get("extra_special_tokens")
    return {"additional_special_tokens": extra, "extra_special_tokens": {}} if isinstance(extra, list) else {}


def check_marks(tokenizer: Any, marks: Sequence[str], hub_name: str) -> None:
    """Raise UserError if a tokenizer lacks special tokens of a chat template; `hub_name` has the right tokenizer."""
    words = tokenizer.get_vocab()
    missing = [mark for mark in marks if mark not in words]
    if missing:
        raise error_in(path=tokenizer.name_or_path)(
            f"the tokenizer {tokenizer.name_or_path} has no {missing[0]}: it belongs to another model",
            f"use that of {hub_name}",
        )


def check_ids(owner: str, tokenizer: Any, folder: Path, num_words: int | None) -> None:
    """Raise UserError if a tokenizer has token IDs beyond the text encoder's `num_words`; None skips the check."""
    largest = max(tokenizer.get_vocab().values())
    if num_words is not None and largest >= num_words:
        raise error_in(path=folder)(
            f"the tokenizer in {folder} has token IDs up to {largest}, but {owner} has {num_words} embeddings: it "
            "belongs to another model",
            "replace it with the right one",
        )
