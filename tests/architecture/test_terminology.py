"""Private words that the field's terms have replaced do not come back, neither in identifiers nor in file names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for top in ("library", "networks", "tools") for path in sorted((ROOT / top).rglob("*.py"))]
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


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name that the code of a module defines or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def words_of(identifier: str) -> str:
    """The words of an identifier, in lower case, between underscores."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
    return f"_{split.strip('_').lower()}_"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_identifiers_use_the_field_s_words(path: Path) -> None:
    found = {}
    for identifier in set(identifiers(ast.parse(path.read_text(encoding="utf-8")))) - IN_FILES:
        words = words_of(identifier)
        for old, new in {**REPLACED, **PHRASES}.items():
            if f"_{old}_" in words:
                found[identifier] = f"say {new}"
    assert not found


@pytest.mark.parametrize("name", FILE_NAMES)
def test_files_use_the_field_s_words(name: str) -> None:
    paths = [path.relative_to(ROOT) for path in FILES if name in path.relative_to(ROOT).parts]
    left = [path for path in paths if (path.parent.as_posix(), path.name) not in MAY_HAVE]
    assert not left, f"say {FILE_NAMES[name]}"
