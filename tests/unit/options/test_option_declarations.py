"""The declarations of options match what the program does with them, in every dialect."""

import pickle
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import zimage_train_network
from library.architectures.flux.options import FluxOptions
from library.architectures.scripts import Script, list_scripts
from library.architectures.sdxl.options import SdxlOptions
from library.architectures.zimage.options import ZImageOptions
from library.base.errors import UserError
from library.options.declared import Declared, read_docs_of_file
from library.options.keyword_args import call_with_keywords
from library.options.kinds import TEXT
from library.options.leco import LecoNetworkOptions, leco_options, list_ignored_by_leco
from library.options.machine.memory import PrecisionOptions, ScaledPrecisionOptions
from library.options.no_effect import find_unused
from library.options.output.saving import SavingOptions
from library.options.requirements import check_requirements
from library.options.toml_lines import find_line
from library.options.train import TrainOptions
from library.options.training.network import NetworkOptions
from library.training.command_line.checks import ignored_for_concepts
from library.training.command_line.cli import normalize, parse
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


def test_the_help_is_the_docstring_below_the_field_also_in_subclasses_and_redeclared() -> None:
    for kind, name, text in (
        (
            SavingOptions,
            "output_name",
            "Name of the saved files, without ending. Unset uses last, epoch-N and at-stepN.",
        ),
        (ScaledPrecisionOptions, "full_fp16", PrecisionOptions.declarations()["full_fp16"].help),
        (LecoNetworkOptions, "network_dim", NetworkOptions.declarations()["network_dim"].help),
    ):
        assert kind.declarations()[name].help == text and len(text) > 40
    assert LecoNetworkOptions.declarations()["network_dim"].default == 4


def test_a_docstring_elsewhere_is_no_help(tmp_path: Path) -> None:
    """Of the class, of a method, and of the function behind a field whose own was forgotten."""
    lines = [
        "class Some(Options):",
        '    """A group."""',
        "    first: int = option(",
        "        1,",
        "    )",
        '    """Of',
        '    two lines."""',
        "    def method(self) -> int:",
        '        """A method."""',
        "    last: int = option(2)",
        "",
        "def function(",
        "    last: int,",
        ") -> int:",
        '    """A function."""',
    ]
    (tmp_path / "some.py").write_text("\n".join(lines))
    docs = read_docs_of_file(str(tmp_path / "some.py"))
    assert docs["Some"] == {"first": "Of two lines."}


# Requirements and exclusions that options declare.


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


# musubi-tuner's options, from a command line or a config file, stand for ours.

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"gradient_checkpointing_cpu_offload": True}, {"cpu_offload_checkpointing": True}),
    ({"vae_dtype": "float32", "mixed_precision": "bf16"}, {"no_half_vae": True}),
    ({"vae_dtype": "bfloat16", "text_encoder_dtype": "bf16", "mixed_precision": "bf16"}, {"no_half_vae": False}),
    ({"dynamo_backend": "AOT_EAGER", "dynamo_mode": "max-autotune"}, {"compile": True, "compile_backend": "aot_eager"}),
    (
        {"dynamo_backend": "INDUCTOR", "dynamo_fullgraph": True, "dynamo_dynamic": True},
        {"compile": True, "compile_backend": "inductor", "compile_fullgraph": True, "compile_dynamic": "true"},
    ),
    ({"dynamo_backend": "NO"}, {"compile": False, "torch_compile": False}),
    ({"save_precision": "fp32"}, {"save_precision": "fp32"}),
]


def options_of(words: dict[str, Any], tmp_path: Path, in_file: bool) -> ZImageOptions:
    parser = zimage_train_network.setup_parser()
    if in_file:
        values = {name: str(value).lower() if value is True else repr(value) for name, value in words.items()}
        (tmp_path / "run.toml").write_text("\n".join(f"{name} = {value}" for name, value in values.items()))
        return ZImageOptions.from_args(parse(parser, ["--config_file", str(tmp_path / "run.toml")]))
    line = [word for name, value in words.items() for word in (f"--{name}", *([] if value is True else [value]))]
    return ZImageOptions.from_args(parse(parser, line))


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(("words", "meaning"), CASES)
def test_words_of_musubi_tuner_stand_for_ours(
    words: dict[str, Any], meaning: dict[str, Any], tmp_path: Path, in_file: bool
) -> None:
    options = options_of(words, tmp_path, in_file)
    values = options.flat()
    assert {name: values[name] for name in meaning} == meaning
    unused = [line for line in find_unused(options, {}) if any(f"--{name} " in line for name in words)]
    assert not unused  # obeyed, so no warning says otherwise


@pytest.mark.parametrize(
    "words",
    [
        {"vae_dtype": "float16", "mixed_precision": "bf16"},
        {"text_encoder_dtype": "float32", "mixed_precision": "bf16"},
        {"flash3": True}, {"use_32bit_attention": True}, {"img_in_txt_in_offloading": True}, {"vae_tiling": True},
        {"disable_numpy_memmap": True}, {"guidance_scale": "3.5"}, {"preserve_distribution_shape": True},
        {"block_swap_h2d_only": True}, {"use_pinned_memory_for_block_swap": True}, {"block_swap_ring_size": "3"},
    ],
)  # fmt: skip
def test_words_without_effect_here_warn_once(words: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(words))
    lines = [line for line in find_unused(options_of(words, tmp_path, False), {}) if f"--{name} has no effect" in line]
    assert len(lines) == 1


# The line of a key in a TOML file.

TOML = """\
seed = 1  # seed = 2
"max_steps" = 3
[general]
flip_aug = true
sides = [
  [512, 768],
  ["a"]
]
[[datasets]]  # the first
resolution = 512
  [[datasets.subsets]]
  image_dir = "num_repeats = 3"
  [[ datasets . "subsets" ]]
  num_repeats = 2
[[datasets]]
resolution = 768
  [[datasets.subsets]]
  num_repeats = 4
  [datasets.subsets.custom_attributes]
  seed = 1
[prompt]
[[prompt.subset]]
[[prompt.subset]]
width = 64
"""


@pytest.mark.parametrize(
    ("setting", "place", "line"),
    [
        ("--max_steps", None, 2),
        ("flip_aug", "data['general']", 4),
        ("resolution", "data['datasets'][0]", 10),
        ("resolution", "data['datasets'][1]", 16),
        ("num_repeats", "data['datasets'][0]['subsets'][1]", 14),
        ("num_repeats", "data['datasets'][1]['subsets'][0]", 18),
        ("width", "[[prompt.subset]] number 2", 24),
        ("seed", "data", 1),
        ("seed", None, None),  # twice
        ("num_repeats", "data['datasets'][0]['subsets'][0]", None),  # in a text
        ("width", "[[prompt.subset]] number 1", None),
        ("image_dir", "data['datasets'][1]['subsets'][1]", None),  # as of an inline table
    ],
)
def test_the_line_is_that_of_the_key_in_its_table(setting: str, place: str, line: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(TOML, encoding="utf-8-sig")
    assert find_line(path, setting, place) == line


def test_a_text_of_several_lines_and_a_missing_file_say_none(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('seed = 1\nnote = """\nsteps = 2\n"""\n')
    assert find_line(path, "seed", None) is None and find_line(tmp_path / "b.toml", "seed", None) is None
