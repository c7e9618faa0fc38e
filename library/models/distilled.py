"""Recognition of distilled models, which have the names and shapes of their base models."""

import logging
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from library.base.errors import about
from library.checkpoints.model_lookup import read_json
from library.options.model import BASE_FLAG
from library.options.training.network import NetworkOptions

logger = logging.getLogger(__name__)

DISTILLED_WORDS = frozenset(("turbo", "distilled", "distill"))
BASE_WORDS = frozenset(("base", "undistilled", "dedistilled", "deturbo"))
NEGATIONS = frozenset(("de", "undistilled", "base"))  # before a word of the distilled model
# Between a separator, after a small letter, and before the last capital of an abbreviation: "ZITurbo" is ZI and Turbo.
WORD_ENDS = r"[\W\d_]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"


@dataclass(frozen=True)
class DistilledRelease:
    """The flag and the words that tell a distilled release from its base model, besides words common to all models."""

    flag: str  # the option that names the release
    distilled_by_default: frozenset[str] = frozenset()  # words of the distilled release unless the name has a base word
    base_words: frozenset[str] = frozenset()
    name: str = "turbo"  # the value of the flag
    advice: str = ""  # names the distilled release, and says what to train instead


def is_distilled(release: DistilledRelease, chosen: bool | None, path: Path) -> bool:
    """Return True if the base model at `path`, a file or folder, is the distilled release.

    The first of these decides: `chosen`, the value of the release's flag; `is_distilled` in model_index.json; the
    words in the name. Raises UserError for a name with words of both releases.
    """
    if chosen is not None:
        return chosen
    path = Path(os.path.abspath(path))  # without following links, whose targets have digests as names
    folder = find_diffusers_folder(path)
    recorded = read_json(folder / "model_index.json").get("is_distilled") if folder else None
    if recorded is not None:
        return bool(recorded)
    decisions = (recognise_name(release, name, path) for name in list_names(path, folder))
    return next((decision for decision in decisions if decision is not None), False)


def recognise_distilled(release: DistilledRelease, chosen: str | None, network: NetworkOptions, path: Path) -> bool:
    """Return True for the distilled release, and warn if it is trained without a training adapter; `chosen` is the
    value of the release's flag."""
    distilled = is_distilled(release, None if chosen is None else chosen == release.name, path)
    return warn_if_distilled(distilled, network, path, release.advice)


def warn_if_distilled(distilled: bool, network: NetworkOptions, path: Path, advice: str) -> bool:
    """Return `distilled`, and warn of a distilled base at `path` that is trained without a training adapter.

    `advice` names the model and the way out, and follows "PATH is".
    """
    if distilled and not network.has_training_adapter:
        logger.warning("%s is %s", path, advice)
    return distilled


def find_diffusers_folder(path: Path) -> Path | None:
    """Return the diffusers folder that is `path` or contains it, at the top or in transformer/; None if none does."""
    if path.is_dir():
        return path
    if path.parent.name == "transformer":
        return path.parent.parent
    return path.parent if (path.parent / "model_index.json").is_file() else None


def list_names(path: Path, folder: Path | None) -> list[str]:
    """Return the names that may tell the release, the first one first.

    That of a diffusers folder or else of the file; in the hub's cache, the repository's in place of the snapshot's.
    """
    snapshot = next((p for p in (path, *path.parents) if re.match("models--", p.parent.parent.name)), None)
    repository = snapshot.parent.parent.name.rpartition("--")[2] if snapshot else ""
    if folder is None:
        return [path.name, repository]
    return [repository if folder == snapshot else folder.name]


def recognise_name(release: DistilledRelease, name: str, path: Path) -> bool | None:
    """Return True for the name of a distilled release, False for its base's, None if no word tells.

    Raises UserError for contradicting words.
    """
    words = split_words(name)
    pairs = list(pairwise(["", *words]))
    distilled = [word for before, word in pairs if word in DISTILLED_WORDS and before not in NEGATIONS]
    base = [word for word in words if word in BASE_WORDS | release.base_words]
    base += [f"{before} {word}" for before, word in pairs if word in DISTILLED_WORDS and before == "de"]
    if distilled and base:
        raise about(BASE_FLAG, path)(
            f": {name} has {distilled[0]!r}, as a distilled model, and {base[0]!r}, as its base model",
            f"set {release.flag} to say which it is",
        )
    if distilled or base:
        return bool(distilled)
    by_default = [word for before, word in pairs if word in release.distilled_by_default and before not in NEGATIONS]
    return True if by_default else None


def split_words(name: str) -> list[str]:
    """Return the words of a file or folder name, in lower case."""
    return [word.lower() for word in re.split(WORD_ENDS, name) if word]
