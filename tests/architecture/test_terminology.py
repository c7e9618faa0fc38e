"""Private words that the field's terms have replaced do not come back, neither in identifiers nor in file names."""

import re
from pathlib import Path

import pytest

from tests.architecture.sources import python_files, source_of

FILES = python_files("library", "networks", "tools")
REPLACED = {  # word of an identifier -> the field's word
    "allotment": "TargetSettings",
    "door": "network module, AdapterKind",
    "picture": "image",
    "pictures": "images",
    "sidebyside": "Multiplexer",
    "modelcard": "BaseModelSpec",
    "rehearse": "check_batches",
    "rehearsal": "check_batches",
    "settle": "resolve",
    "sketch": "on_meta_device",
    "site": "target",
    "sites": "targets",
    "shelf": "ShardedBlock",
    "told": "conditioning, result, message, digest: what it is",
    "trainee": "AdapterRun",
    "twin": "duplicate",
}
PHRASES = {  # several words of an identifier in a row
    "hand_over": "identity_collate",
    "in_words": "format_…",
    "speaking_of": "log_prefix",
    "way_out": "suggest_fix",
    "ways_out": "memory_hints",
    "without_values": "on_meta_device",
}
FILE_NAMES = {
    "adapters.py": "targets.py, adapter_names.py",
    "average.py": "ema.py",
    "card.py": "spec.py",
    "doors": "kinds",
    "forms": "formats",
    "joins.py": "dora.py",
    "noise_levels.py": "timesteps.py",
    "noise_ranks.py": "tlora.py",
    "perturbation.py": "ggpo.py",
    "places": "offload",
    "rules.py": "ranges.py, no_effect.py",
    "sites": "targets",
    "spread.py": "sharded.py",
    "starts.py": "init.py",
    "turned.py": "orthogonal.py",
}
IN_FILES = {  # fields of events, of the origin of latents and of the journals of shards
    "num_pictures",
    "picture",
    "picture_bytes",
    "picture_hash",
    "picture_mtime_ns",
    "pictures",
    "pictures_per_second",
}
MAY_HAVE = {("networks/core/targets", "rules.py")}  # a rule is a pattern with its rank, as --network_args says


def words_of(identifier: str) -> str:
    """The words of an identifier, in lower case, between underscores."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
    return f"_{split.strip('_').lower()}_"


def private_words_in(path: Path) -> dict[str, str]:
    """Return the identifiers of a file that have a replaced word, with what to say instead."""
    words = {identifier: words_of(identifier) for identifier in source_of(path).identifiers - IN_FILES}
    terms = (REPLACED | PHRASES).items()
    return {name: f"say {new}" for name, split in words.items() for old, new in terms if f"_{old}_" in split}


def test_identifiers_use_the_field_s_words() -> None:
    found = {path.as_posix(): private_words_in(path) for path in FILES}
    assert {path: words for path, words in found.items() if words} == {}


@pytest.mark.parametrize("name", FILE_NAMES)
def test_files_use_the_field_s_words(name: str) -> None:
    paths = [path for path in FILES if name in path.parts]
    left = [path for path in paths if (path.parent.as_posix(), path.name) not in MAY_HAVE]
    assert not left, f"say {FILE_NAMES[name]}"
