"""Requirements and exclusions that options declare."""

from typing import Any

import pytest

from library.architectures.flux.options import FluxOptions
from library.base.errors import UserError
from library.options.keyword_args import call_with_keywords
from library.options.no_effect import find_unused
from library.options.requirements import check_requirements
from tests.running import STARTED

KINDS = {script: spec.options for script, spec in STARTED.items()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_required_and_excluded_options_exist_in_some_script(kind: Any) -> None:
    option_names = {name for options in KINDS.values() for name in options.declarations()}
    for name, declared in kind.declarations().items():
        assert {need.partition("=")[0] for need in (*declared.requires, *declared.excludes)} <= option_names, name


def test_a_named_events_file_does_not_conflict_with_options_that_need_standard_output() -> None:
    check_requirements(FluxOptions().with_values({"console_log_simple": True, "log_events": "events.jsonl"}))


def test_a_negative_strength_counts_as_set_and_a_negative_count_as_unset() -> None:
    darker = FluxOptions().with_values({"noise_offset": -0.1, "noise_offset_random_strength": True})
    assert not [line for line in find_unused(darker, {}) if line.startswith("--noise_offset_random_strength")]
    every = {"sample_prompts": "prompts.txt", "sample_every_n_steps": 10, "sample_every_n_epochs": -1}
    assert not [
        line for line in find_unused(FluxOptions().with_values(every), {}) if line.startswith("--sample_every_n_s")
    ]


def test_a_misspelt_keyword_of_an_optimizer_is_answered_with_the_nearest() -> None:
    def build(parameters: object, weight_decay: float = 0.0) -> None: ...

    with pytest.raises(UserError, match=r"weight_decy is unknown to build; .* \(did you mean weight_decay\?\)"):
        call_with_keywords(build, (0,), {"weight_decy": 1.0}, flag="--optimizer_args", set_elsewhere={})
