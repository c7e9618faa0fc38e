"""Requirements and exclusions that options declare."""

from typing import Any

import pytest

from library.architectures.flux.options import FluxOptions
from library.errors import UserError
from library.options.no_effect import find_unused
from library.options.requirements import check_requirements
from tests.running import STARTED

KINDS = {script: spec.options for script, spec in STARTED.items()}


def refusal_of(**values: Any) -> str:
    with pytest.raises(UserError) as refused:
        check_requirements(FluxOptions().with_values(values))
    return str(refused.value)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_required_and_excluded_options_exist_in_some_script(kind: Any) -> None:
    option_names = {name for options in KINDS.values() for name in options.facts()}
    for name, facts in kind.facts().items():
        assert {need.partition("=")[0] for need in (*facts.requires, *facts.excludes)} <= option_names, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            "--network_train_unet_only does not work with --network_train_text_encoder_only: together they train",
        ),
        ({"v_pred_like_loss": 0.5, "v_parameterization": True}, "--v_pred_like_loss 0.5 does not work with --v_param"),
        ({"train_inpainting": True, "cache_latents": True}, "--train_inpainting does not work with --cache_latents: "),
        ({"console_log_simple": True, "log_events": "-"}, "--console_log_simple does not work with --log_events -: "),
        ({"fit": "8GB", "dataset_class": "my.Set"}, "--fit 8GB does not work with --dataset_class my.Set: "),
        (
            {"cache_text_encoder_outputs": True, "dataset_class": "my.Set"},
            "does not work with --dataset_class my.Set: ",
        ),
        ({"sweep": ["network_dim=1,2"], "compile": True}, "--sweep does not work with --compile: "),
        ({"sweep": ["network_dim=1,2"], "log_events": "-"}, "--sweep does not work with --log_events -: "),
    ],
)
def test_options_that_exclude_each_other_are_refused_with_the_reason(values: dict[str, Any], message: str) -> None:
    assert message in refusal_of(**values) and refusal_of(**values).endswith("; leave one of them out")
    for name in values:
        check_requirements(FluxOptions().with_values({name: values[name]}))


def test_a_named_events_file_does_not_conflict_with_options_that_need_standard_output() -> None:
    check_requirements(FluxOptions().with_values({"console_log_simple": True, "log_events": "events.jsonl"}))


def test_a_negative_strength_counts_as_set_and_a_negative_count_as_unset() -> None:
    darker = FluxOptions().with_values({"noise_offset": -0.1, "noise_offset_random_strength": True})
    assert not [line for line in find_unused(darker, {}) if line.startswith("--noise_offset_random_strength")]
    every = {"sample_prompts": "prompts.txt", "sample_every_n_steps": 10, "sample_every_n_epochs": -1}
    assert not [
        line for line in find_unused(FluxOptions().with_values(every), {}) if line.startswith("--sample_every_n_s")
    ]
