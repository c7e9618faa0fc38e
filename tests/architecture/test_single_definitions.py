"""Facts that were defined in several places stay in one: the removed names must not come back."""

import ast
import re

import pytest

from tests.architecture.sources import python_files, text_of

TEXTS = {path.as_posix(): text_of(path) for path in python_files("library", "networks", "tools", "benchmarks")}
GRAMMAR = "library/checkpoints/adapter_keys.py"
ONCE = {  # definition -> its file
    r"^def recognise_naming\(": GRAMMAR,
    r"^PEFT_PREFIX\b": GRAMMAR,
    r"^def to_underscores\(": GRAMMAR,
    r"^class AdapterKey\b": GRAMMAR,
    r"^def recognise_layout\(": "networks/core/registry/layouts.py",
}
FACTOR = re.compile(r"\blora_(up|down|mid|A|B)\b|\bhada_|\blokr_|\boft_R\b|\bboft_[Rs]\b|\bw_norm\b|\bb_norm\b")
MAY_NAME_FACTORS = (
    "networks/core/kinds/",
    "networks/core/changes/",
    GRAMMAR,
    "library/checkpoints/compatibility.py",  # the key suffixes that other programs look for
    "library/models/identify.py",  # markers of files that are not checkpoints
    "benchmarks/",  # reference implementations for comparison
)


@pytest.mark.parametrize("pattern", ONCE)
def test_every_fact_is_defined_once(pattern: str) -> None:
    files = [path for path, text in TEXTS.items() if re.search(pattern, text, re.MULTILINE)]
    assert files == [ONCE[pattern]]


def factors_in(text: str) -> list[str]:
    """Return the attributes and key suffixes that name factors; texts for users may name them."""
    tree = ast.parse(text)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    keys = [text for text in texts if " " not in text.strip() and FACTOR.search(text)]
    return keys + [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and FACTOR.search(node.attr)]


def test_no_other_module_accesses_factors() -> None:
    other_files = {path: text for path, text in TEXTS.items() if not path.startswith(MAY_NAME_FACTORS)}
    accesses = {path: factors_in(text) for path, text in other_files.items() if FACTOR.search(text)}
    assert {path: names for path, names in accesses.items() if names} == {}, "ask the change in networks/core/kinds"
