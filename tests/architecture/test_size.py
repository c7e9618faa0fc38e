"""No file is too long to read at once, and no function has too many branches."""

from tests.architecture.sources import python_files, scripts, source_of, text_of

MOST_LINES, MOST_BRANCHES = 500, 20
# Functions that have more, with their number. None may be added.
MORE_BRANCHES = {
    ("tools/check_lora_weights.py", "judge"): 21,
    ("tools/merge_adapters.py", "make_metadata"): 22,
    ("tools/merge_adapters.py", "merge_adapters"): 22,
}

SOURCES = [*python_files("library", "networks", "tools", "benchmarks"), *scripts()]


def test_files_have_at_most_500_lines() -> None:
    long = {str(path): count for path in SOURCES if (count := text_of(path).count("\n")) > MOST_LINES}
    assert not long, "split them by topic"


def test_functions_have_at_most_20_branches() -> None:
    over = {
        f"{path}: {name} has {count}"
        for path in SOURCES
        for name, count, _ in source_of(path).functions
        if count > MORE_BRANCHES.get((path.as_posix(), name), MOST_BRANCHES)
    }
    assert not over
