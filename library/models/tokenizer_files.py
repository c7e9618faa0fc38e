"""Where the files of a tokenizer lie: beside a model, in --tokenizer_cache_dir, or on the hub."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints.model_lookup import fetch_snapshot
from library.errors import UserError

BYTE_PAIR_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files that make one tokenizer."""

    hub_name: str
    files: tuple[str, ...]  # those of the repository that are fetched
    are_in: Callable[[Path], bool]  # whether the tokenizer can be made from a folder

    def cache_folder(self, cache_dir: str | None) -> Path | None:
        """The folder of --tokenizer_cache_dir that keeps them."""
        return Path(cache_dir).expanduser() / self.hub_name.replace("/", "_") if cache_dir else None

    def cache_place(self, cache_dir: str | None) -> str:
        """That folder in words, with the option that names it where it is not given."""
        cached = self.cache_folder(cache_dir)
        name = self.hub_name.replace("/", "_")
        return str(cached) if cached else f"<folder>/{name} and give --tokenizer_cache_dir <folder>"

    def find(self, folders: Sequence[Path], cache_dir: str | None) -> Path:
        """The first of `folders` that has them, else the cache folder, else that of the hub, copied into the cache.

        Raises ConnectionError with the reason when the hub does not give them.
        """
        cached = self.cache_folder(cache_dir)
        for folder in (*folders, *([cached] if cached else [])):
            if self.are_in(folder):
                return folder
        downloaded = fetch_snapshot(self.hub_name, self.files)
        if cached is not None:
            cached.mkdir(parents=True, exist_ok=True)
            for name in self.files:
                if (downloaded / name).is_file():
                    shutil.copyfile(downloaded / name, cached / name)
        return downloaded

    def find_or_explain(self, owner: str, needed: str, folders: Sequence[Path], cache_dir: str | None) -> Path:
        """`find`, which raises UserError saying which files of whose tokenizer to put where."""
        try:
            return self.find(folders, cache_dir)
        except ConnectionError as error:
            raise UserError(
                f"{owner}'s tokenizer is in none of {', '.join(map(str, folders))}, and {self.hub_name} cannot be "
                f"downloaded ({error}). Put {needed} of {self.hub_name} into one of them, or into "
                f"{self.cache_place(cache_dir)}"
            ) from error


def holds_byte_pairs(folder: Path) -> bool:
    """Whether a tokenizer of byte pairs, such as CLIP's and Qwen's, can be made from the files of a folder."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def read_tokenizer(read: Callable[[], Any], place: Path) -> Any:
    """What `read` makes of the tokenizer's files at `place`. Raises UserError naming them where they are damaged."""
    try:
        return read()
    except Exception as error:  # transformers and tokenizers raise whatever they meet in a file, also bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"the tokenizer {place} cannot be read ({reason}); put its files there again") from error


def check_ids(owner: str, tokenizer: Any, folder: Path, num_words: int | None) -> None:
    """Raise UserError where a tokenizer has ids that its text encoder has no word for; None if that is not there."""
    largest = max(tokenizer.get_vocab().values())
    if num_words is not None and largest >= num_words:
        raise UserError(
            f"the tokenizer in {folder} has ids up to {largest}, {owner} knows {num_words} words: it belongs to "
            "another model; put the right one into its place"
        )
