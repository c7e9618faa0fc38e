"""Private jargon that was replaced by the field's terms does not come back in identifiers or file names."""

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
    "rehearse": "preflight",
    "rehearsal": "preflight",
    "settle": "resolve",
    "sketch": "on_meta_device",
    "site": "target",
    "sites": "targets",
    "shelf": "ShardedBlock",
    "told": "conditioning, result, message, digest: what it is",
    "trainee": "network",
    "twin": "duplicate",
}
PHRASES = {  # consecutive words of an identifier
    "hand_over": "identity_collate",
    "in_words": "format_…",
    "speaking_of": "label",
    "way_out": "suggest_fix",
    "ways_out": "memory_hints",
    "without_values": "on_meta_device",
}
FILE_NAMES = {
    "adapters.py": "layers.py",
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
IN_FILES = {  # fields of events, of latent origins and of shard journals
    "num_pictures",
    "picture",
    "picture_bytes",
    "picture_hash",
    "picture_mtime_ns",
    "pictures",
    "pictures_per_second",
}
MAY_HAVE = {("networks/core/targets", "rules.py")}  # a rule is a pattern with its rank, as in --network_args


def split_words(identifier: str) -> str:
    """Return the lower-case words of an identifier, separated by underscores."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
    return f"_{split.strip('_').lower()}_"


def private_words_in(path: Path) -> dict[str, str]:
    """Return the identifiers of a file that contain a replaced word, with the replacement."""
    words = {identifier: split_words(identifier) for identifier in source_of(path).identifiers - IN_FILES}
    terms = (REPLACED | PHRASES).items()
    return {name: f"say {new}" for name, split in words.items() for old, new in terms if f"_{old}_" in split}


def test_identifiers_use_the_terms_of_the_field() -> None:
    jargon = {path.as_posix(): private_words_in(path) for path in FILES}
    assert {path: words for path, words in jargon.items() if words} == {}


@pytest.mark.parametrize(
    ("start", "returned"), [("refuse_", r"None|NoReturn"), ("(is|has|are|mixes)_", r"bool|TypeGuard\[.*\]|Tensor|")]
)
def test_names_say_what_a_function_returns(start: str, returned: str) -> None:
    others = {
        f"{path}: {name} returns {kind}"
        for path in FILES
        for name, _, kind in source_of(path).functions
        if re.match(start, name) and not re.fullmatch(returned, kind)
    }
    assert not others


@pytest.mark.parametrize("name", FILE_NAMES)
def test_file_names_use_the_terms_of_the_field(name: str) -> None:
    paths = [path for path in FILES if name in path.parts]
    checked = [path for path in paths if (path.parent.as_posix(), path.name) not in MAY_HAVE]
    assert not checked, f"say {FILE_NAMES[name]}"
