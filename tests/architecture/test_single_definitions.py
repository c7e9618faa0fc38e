"""Facts stand in one place, and what follows from options is resolved once."""

import ast
import re
from pathlib import Path

import pytest

from tests.architecture.sources import python_files, source_of, text_of

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


# What follows from the options of a run is resolved once, in `command_line/resolved.py`; stages take the values.

# The number of calls in each file, with the reason for those outside.
RESOLVED = "library/training/command_line/resolved.py"
CALLS = {
    "open_network_module": {
        "library/training/command_line/opened_base.py": 1,
        "library/training/models/requests.py": 1,  # for commands that count or measure a run
        "library/training/models/frozen_adapters.py": 1,  # the reader of adapter files
        "library/training/offline/contact_sheet.py": 1,
        "library/training/offline/file_losses.py": 1,
    },
    "TextPlan.resolve": {
        RESOLVED: 1,
        "library/training/models/requests.py": 1,
        "library/training/command_line/caching.py": 1,  # a command
        "tools/choose_checkpoint.py": 1,
        "tools/contact_sheet.py": 1,
        "library/train_photos/base.py": 1,  # the losses that tell what a base predicts
    },
    "BaseFormats.load": {
        RESOLVED: 2,  # again for the format that --fit chooses
        "library/training/models/requests.py": 1,
        "library/training/offline/contact_sheet.py": 1,
        "library/training/offline/file_losses.py": 1,
    },
    "load_format": {
        "library/training/models/weight_formats.py": 2,  # `BaseFormats.load`, and the package that a format needs
        "library/training/command_line/checks.py": 1,  # all formats, to name those that can multiply
        "library/training/evaluation/preview_weights.py": 1,  # another file
        "library/models/loading.py": 1,  # the format of a file
        "library/memory/planner/weights.py": 1,  # each format that the planner considers
    },
    "Names.build": {
        "library/training/command_line/outputs.py": 1,
        "library/training/command_line/audit_only.py": 1,  # a command
        "library/training/command_line/checks.py": 1,  # before the options are checked
        "tools/contact_sheet.py": 3,
    },
}
MOST_IMPORTS = 31  # of the function that trains
MOST_MODULES = 25  # that a module which builds a run imports
MOST_LINES_OF_LOOP = 40
MOST_TAKING_ALL = 26  # functions that take all options
WITH_WHOLE_RUNS = (  # which write the command of a run
    "library/commands/", "library/train_photos/", "library/training/sweep/driver.py",
    "library/training/sweep/commands.py", "library/training/command_line/sweeps.py",
)  # fmt: skip


TRAINING = Path("library/training/command_line/training.py")


def test_only_listed_calls_resolve_a_value_of_the_run() -> None:
    found: dict[str, dict[str, int]] = {name: {} for name in CALLS}
    for path in python_files("library", "networks", "tools"):
        for name in CALLS:
            if count := len(re.findall(rf"(?<!def )\b{re.escape(name)}\(", text_of(path))):
                found[name][path.as_posix()] = count
    assert found == CALLS


def test_the_function_that_trains_imports_few_names() -> None:
    assert sum(len(names) or 1 for _, names in source_of(TRAINING).imports) <= MOST_IMPORTS


@pytest.mark.parametrize("name", ["run/prepare", "command_line/resolved", "planning/counting"])
def test_what_builds_a_run_imports_few_modules(name: str) -> None:
    imports = source_of(Path(f"library/training/{name}.py")).imports
    assert len({module for module, _ in imports if module.startswith(("library.", "networks."))}) <= MOST_MODULES


def test_the_loop_fits_on_a_screen() -> None:
    tree = ast.parse(text_of(Path("library/training/loop/loop.py")))
    (train,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno is not None and train.end_lineno - train.lineno < MOST_LINES_OF_LOOP


def test_few_functions_take_all_options() -> None:
    taking = [
        node.name
        for path in python_files("library", "networks")
        if "TrainOptions" in text_of(path) and not path.as_posix().startswith(WITH_WHOLE_RUNS)
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.FunctionDef)
        and any("TrainOptions" in ast.unparse(a.annotation) for a in node.args.args if a.annotation)
    ]
    assert len(taking) <= MOST_TAKING_ALL, taking
