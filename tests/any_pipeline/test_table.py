"""The table of benchmarks/RESULTS.md is what was measured; `python -m tests.any_pipeline.test_table` prints it."""

from typing import Any

import pytest

from library.architectures.any_pipeline.trees import format_path
from tests.any_pipeline.test_convention import measured
from tests.running import ROOT
from tests.tiny.pipelines import PIPELINES


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


if __name__ == "__main__":
    print("\n".join(map(row_of, sorted(PIPELINES))))
