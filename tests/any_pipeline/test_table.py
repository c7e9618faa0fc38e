"""The table of benchmarks/RESULTS.md is what was measured, and that of docs/any_model.md what the tests train.

`python -m tests.any_pipeline.test_table` prints the first and writes the second.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from library.architectures.any_pipeline.folder import list_arguments
from library.architectures.any_pipeline.refusals import find_cause
from library.architectures.any_pipeline.trees import format_path
from tests.any_pipeline.published import MODELS, UNKNOWN
from tests.any_pipeline.test_convention import measured
from tests.any_pipeline.test_refusals import NOT_TRAINED, SHOWN, TRAINED
from tests.hiding import lazily
from tests.running import ROOT
from tests.tiny.more_pipelines import MORE
from tests.tiny.pipelines import PIPELINES

diffusers = lazily("diffusers")

PAGE = ROOT / "docs" / "any_model.md"
BEGIN, END = "<!-- classes: written by tests/any_pipeline/test_table.py -->", "<!-- end of classes -->"


def row_of(name: str) -> str:
    """Return the row of a pipeline."""
    watched, convention, _ = measured(name)
    level = "sigma" if convention.mix == "flow" else "t"
    times = [
        f"`{format_path(path)}`: {convention.lines[path].describe(level) if path in convention.lines else 'a table'}"
        for path in convention.time
    ]
    return f"| {name} | {', '.join(times)} | {convention.target} | {loader_of(watched.pipe, convention.denoiser)} |"


def loader_of(pipe: Any, component: str) -> str:
    has_own = getattr(getattr(pipe, component), "load_lora_adapter", None) is not None
    if has_own and component in getattr(pipe, "_lora_loadable_modules", ()):
        return "`load_lora_weights`"
    return f"`{component}.load_lora_adapter`" if has_own else "PEFT"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_the_page_lists_what_is_measured(name: str) -> None:
    assert row_of(name) in (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").splitlines()


def list_classes() -> str:
    """Return the lists of classes of docs/any_model.md: those that are trained by their schedulers, and the others."""
    schedulers: dict[str, list[str]] = {}
    for name in sorted({*PIPELINES, *MORE, *TRAINED}):
        known = [model.scheduler for model in MODELS if name in model.pipelines and model.scheduler != UNKNOWN]
        schedulers.setdefault(", ".join(dict.fromkeys(known)) or "not known", []).append(name)
    reasons: dict[str, list[str]] = {}
    shown = {name: find_cause(kind := getattr(diffusers, name), tuple(list_arguments(kind)), "", {}) for name in SHOWN}
    by_class = {**NOT_TRAINED, **shown}
    for name, reason in sorted(by_class.items()):
        reasons.setdefault(reason or "", []).append(name)
    num_trained = sum(map(len, schedulers.values()))
    return "\n".join(
        [
            f"Of {num_trained + len(by_class)} classes of diffusers that draw from a text alone, {num_trained} are "
            "trained, each on a tiny random model with the scheduler that its publisher uses, where that is known.",
            "",
            *write_table("publisher's scheduler", "classes that are trained", schedulers),
            "",
            *write_table("why not", "classes that are not", reasons),
        ]
    )


def write_table(key: str, title: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    shown = {value: ", ".join(name.removesuffix("Pipeline") for name in found) for value, found in names.items()}
    return [f"| {key} | {title} |", "|---|---|", *(f"| {value} | {found} |" for value, found in shown.items())]


def place_classes(page: str) -> str:
    """Return the page with the lists between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{list_classes()}\n{END}{rest.partition(END)[2]}"


def test_the_page_lists_the_classes_that_are_trained() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert place_classes(text) == text, "run python -m tests.any_pipeline.test_table"


def test_the_readme_has_the_number_of_classes() -> None:
    count = len({*PIPELINES, *MORE, *TRAINED})
    assert f"{count} classes of pipelines" in (ROOT / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(place_classes(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print("\n".join(map(row_of, sorted(PIPELINES))))
