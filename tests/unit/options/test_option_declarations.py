"""The declarations of every option match what the program does with the option."""

import pickle
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from library.architectures.scripts import Script, list_scripts
from library.architectures.sdxl.options import SdxlOptions
from library.base.errors import UserError
from library.options.declared import Declared
from library.options.kinds import TEXT
from library.options.leco import leco_options, list_ignored_by_leco
from library.options.no_effect import find_unused
from library.options.train import TrainOptions
from library.training.command_line.checks import ignored_for_concepts
from library.training.command_line.cli import normalize
from library.training.command_line.option_checks import check_choices
from library.training.command_line.targets import find_input_files
from library.training.config_file import SECRETS
from library.training.reporting.trackers import loggable_options
from library.training.run.run_events import list_changed_options
from library.training.saving.resume import option_differences, record_options
from library.training.saving.state import StateManifest
from library.training.sweep.combinations import parse_word, short_names
from tests.running import STARTED

SDXL_LECO = leco_options(SdxlOptions)
KINDS = {script: spec.options for script, spec in STARTED.items()}
by_script = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def with_all_changed(kind: type[TrainOptions]) -> TrainOptions:
    """Return options of which none has its default value."""
    return kind().with_values({name: make_other_value(declared) for name, declared in kind.declarations().items()})


def make_other_value(declared: Declared) -> Any:
    """Return a value of an option that is set and is not the default."""
    if declared.choices:
        (value, *_) = (choice for choice in declared.choices if choice not in (declared.default, None, 0, "no"))
    elif declared.kind.type == "flag":
        value = not declared.default
    elif isinstance(declared.default, int | float):
        value = declared.default + 1
    else:
        value = declared.kind.parse("7")
    return [value] if declared.nargs else value


def names_in(lines: Iterable[str]) -> set[str]:
    """Return the options that lines begin with."""
    return {match[1] for line in lines if (match := re.match(r"--(\w+)", line))}


@by_script
def test_resuming_warns_about_every_option_that_must_not_change(kind: type[TrainOptions]) -> None:
    state = StateManifest(Path("s"), 1, 0, 1, record_options(kind()), {}, {})
    warned = names_in(line for _, line in option_differences(state, with_all_changed(kind), 1))
    assert warned == {name for name, declared in kind.declarations().items() if not declared.may_change_on_resume}
    assert {"network_dim", "min_snr_gamma", "mixed_precision", "max_train_steps", "resolution"} <= warned
    assert not {"output_dir", "seed", "dataset_config", "blocks_to_swap", "save_every_n_steps", "log_events"} & warned


@by_script
def test_the_facts_of_an_option_do_not_contradict_each_other(kind: type[TrainOptions]) -> None:
    for name, declared in kind.declarations().items():
        assert declared.affects_training or not declared.kept_in_state, name


@by_script
def test_short_names_are_unique(kind: type[TrainOptions]) -> None:
    names = short_names(kind)
    short = [name for name in names.values() if name]
    assert len(short) == len(set(short)) > 60
    assert all(kind.declarations()[name].kind.type == "text" for name in names if not names[name]), (
        "a bare number says nothing"
    )


def test_any_option_can_be_swept_but_output_resuming_launching_and_diagnostics() -> None:
    options, names = TrainOptions(), short_names(TrainOptions)
    assert {"resolution", "min_snr_gamma", "blocks_to_swap", "base_format", "max_train_steps", "seed"} <= names.keys()
    refused = {"output_dir", "resume", "autoresume", "launcher", "sweep", "dry_run", "selftest", "save_state",
               "network_args", "shard_base", "huggingface_token", "config_file"}  # fmt: skip
    assert not refused & names.keys()
    for name in TrainOptions.defaults():
        if name in names:
            assert parse_word(f"{name}=a,b", options) == (name, ["a", "b"])
            continue
        with pytest.raises(UserError, match=f"^--sweep {name}: "):
            parse_word(f"{name}=a,b", options)


def test_options_that_leco_ignores_are_warned_about_with_the_reason() -> None:
    options = with_all_changed(SDXL_LECO)
    ignored = list_ignored_by_leco(SDXL_LECO)
    lines = list(find_unused(options, ignored_for_concepts(type(options), draws_previews=False)))
    assert {f"--{name} has no effect: {why}" for name, why in ignored.items()} <= set(lines)
    assert {"train_data_dir", "cache_latents", "validation_split", "text_cache_variants"} <= ignored.keys()
    assert not {"text_encoder_cpu", "network_dim", "seed", "sweep", "max_train_epochs"} & ignored.keys()


@by_script
def test_zero_becomes_unset_if_unset_is_the_default(kind: type[TrainOptions]) -> None:
    values = vars(normalize(Namespace(**dict.fromkeys(kind.defaults(), 0))))
    assert {name for name, value in values.items() if value is None} == {
        name for name, declared in kind.declarations().items() if declared.zero_is_unset
    }
    assert all(kind.defaults()[name] is None for name in values if values[name] is None)


@by_script
def test_defaults_hold_on_the_command_line_and_in_another_process(kind: type[TrainOptions]) -> None:
    """A sweep sends options to a process, by the names of their classes."""
    parser = ArgumentParser()
    kind.add_to(parser)
    options = kind()
    assert options.flat() == kind.defaults() == vars(parser.parse_args([]))
    assert pickle.loads(pickle.dumps(options)).flat() == options.flat()


@by_script
def test_passwords_are_never_written_to_files_or_trackers(kind: type[TrainOptions]) -> None:
    secrets = {name for name, declared in kind.declarations().items() if declared.secret}
    assert secrets == set(SECRETS)
    options = with_all_changed(kind)
    logged = loggable_options(options)
    assert not secrets & (record_options(options).keys() | list_changed_options(options).keys() | logged.keys())
    assert logged.keys() == {name for name, declared in kind.declarations().items() if declared.logged}
    assert not {"output_dir", "train_data_dir", "pretrained_model_name_or_path"} & logged.keys()


@by_script
def test_a_value_outside_the_choices_is_refused_unless_the_option_is_open(kind: type[TrainOptions]) -> None:
    passing = set()
    for name, declared in kind.declarations().items():
        if declared.choices:
            options = kind().with_values({name: ["other"] if declared.nargs else "other"})
            if declared.takes_other_values:
                check_choices(options)
                passing.add(name)
            else:
                with pytest.raises(UserError, match=f"^--{name} is .*other.*; use one of "):
                    check_choices(options)
    assert passing == {"max_token_length", "dynamo_backend", "sample_sampler", "zero_stage"}


def test_output_paths_are_not_declared_as_inputs(tmp_path: Path) -> None:
    for name, declared in TrainOptions.declarations().items():
        if declared.kind is TEXT and not declared.nargs:
            path = tmp_path / name
            path.touch()
            options = TrainOptions().with_values({name: str(path)})
            is_output = declared.path == "new file"
            assert find_input_files(options) == ([] if is_output else [path])


@pytest.mark.parametrize("script", list_scripts(), ids=lambda script: script.name)
def test_the_option_of_every_published_file_is_checked_as_a_path_before_torch_is_imported(script: Script) -> None:
    declarations = script.options.declarations()
    assert [file.flag for file in script.files if not declarations[file.flag].path] == []
