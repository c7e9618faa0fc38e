"""Any command line, config file or options set by a program either work or give an error message."""

import argparse
import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toml
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from library.options.train import TrainOptions
from library.training.command_line.checks import check, report_unused
from library.training.command_line.cli import from_program, normalize, parse_words, unset_empty
from library.training.config_file import basic_string, read_config
from library.training.models.preflight import mute_logging, take_first_step
from library.training.optimization.lr_schedules import build_schedule
from library.training.optimization.optimizers import build_optimizer
from library.translation.reading import read_configuration
from library.translation.translating import translate
from library.translation.writing import TranslatedFiles, describe, render_files
from tests.contracts.other_trainers import Example, list_examples
from tests.fuzz.budget import any_input, works_or_says_why
from tests.fuzz.test_files_of_models import places, values, with_value
from tests.running import ROOT, SCRIPTS

# These act on the test process.
LEFT_ALONE = {"help", "config_file", "output_config", "console_log_file", "console_log_level"}

texts = st.text(max_size=10)
numbers = st.one_of(
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, 1, -1, 64, 1000, 10**9]),
    st.floats(),
    st.sampled_from([0.5, 1e-4, 1e308, -1e-9]),
)
scalars = st.one_of(texts, numbers, st.booleans())
drawn_values = st.one_of(scalars, st.lists(scalars, max_size=3))


def parser_of(script: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(script).setup_parser()
    return parser


def options_type(script: str) -> type[TrainOptions]:
    return SCRIPTS[script].options


def check_options(script: str, args: argparse.Namespace) -> None:
    options = options_type(script).from_args(args)
    check(options)
    report_unused(options, {})


PARSERS = {script: parser_of(script) for script in SCRIPTS}
KNOWN = {
    script: sorted(action.dest for action in parser._actions if action.dest not in LEFT_ALONE)
    for script, parser in PARSERS.items()
}
GOOD = {
    "pretrained_model_name_or_path": "owner/model",
    "train_data_dir": ".",
    "resolution": "64",
    "network_module": "networks.lora",
    "output_dir": "out",
}


@any_input(15)
@given(data=st.data())
def test_any_command_line_works_or_gives_an_error(data: st.DataObject) -> None:
    """argparse exits with status 2 for arguments that it rejects."""
    script = data.draw(st.sampled_from(sorted(SCRIPTS)))
    words = [word for name, value in GOOD.items() for word in (f"--{name}", value)]
    for name in data.draw(st.lists(st.sampled_from(KNOWN[script]), max_size=3)):
        words += [f"--{name}", *(str(value) for value in data.draw(st.lists(scalars, max_size=2)))]
    try:
        args = parse_words(PARSERS[script], words)
    except SystemExit as ended:
        assert ended.code == 2
        return
    works_or_says_why(lambda: check_options(script, normalize(unset_empty(args, PARSERS[script]))))


@any_input(15)
@given(data=st.data())
def test_any_config_file_values_work_or_give_an_error(tmp_path: Path, data: st.DataObject) -> None:
    script = data.draw(st.sampled_from(sorted(SCRIPTS)))
    names = st.one_of(st.sampled_from(KNOWN[script]), st.from_regex(r"[a-z_]{1,8}", fullmatch=True))
    table = data.draw(st.dictionaries(names, drawn_values, max_size=3))
    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = basic_string
    path = tmp_path / "config.toml"
    path.write_text(str(toml.dumps({"any": {**GOOD, **table}}, encoder)), encoding="utf-8")
    parser = PARSERS[script]

    def read() -> None:
        config = read_config(path, {action.dest: action for action in parser._actions if action.dest != "help"})
        check_options(
            script, normalize(unset_empty(parse_words(parser, [], argparse.Namespace(**config.values)), parser))
        )

    works_or_says_why(read)


@any_input(15)
@given(data=st.data())
def test_any_values_set_by_a_program_work_or_give_an_error(fresh_process: None, data: st.DataObject) -> None:
    """The values include Python objects that no file can contain."""
    script = data.draw(st.sampled_from(sorted(SCRIPTS)))
    odd = st.one_of(drawn_values, st.none(), st.tuples(scalars, scalars), st.just(Path("a/b")), st.binary(max_size=4))
    table = data.draw(st.dictionaries(st.sampled_from(KNOWN[script]), odd, max_size=3))
    namespace = argparse.Namespace(**{**GOOD, **table})
    works_or_says_why(lambda: check_options(script, from_program(PARSERS[script], namespace)))


OPTIMIZERS = ["AdamW", "Lion", "SGDNesterov", "Adafactor", "torch.optim.RMSprop", "torch.optim.LBFGS", "Adagrad", "x.y"]
ARGUMENTS = [
    "betas",
    "eps",
    "weight_decay",
    "lr",
    "momentum",
    "relative_step",
    "scale_parameter",
    "amsgrad",
    "params",
    "x",
]
SCHEDULES = ["constant", "cosine", "linear", "polynomial", "cosine_with_restarts", "constant_with_warmup", "rex", "x"]
CLASSES = ["StepLR", "CosineAnnealingLR", "OneCycleLR", "LambdaLR", "ExponentialLR", "SequentialLR", "a.B"]
CLASS_ARGUMENTS = ["step_size", "gamma", "T_max", "max_lr", "total_steps", "lr_lambda", "last_epoch", "eta_min"]
literals = st.one_of(
    texts, numbers.map(str), st.sampled_from(["True", "None", "(0.9,)", "(0.9,0.99)", "[]", "{}", "1e400", "[1,'a']"])
)


def pairs(names: list[str]) -> st.SearchStrategy[str]:
    return st.one_of(texts, st.tuples(st.sampled_from(names), literals).map("=".join))


@any_input(15)
@given(data=st.data())
def test_any_optimizer_and_schedule_work_or_give_an_error(data: st.DataObject) -> None:
    """Build them as before a run, on stub parameters, and take one step."""
    draw = data.draw
    args = TrainOptions.defaults() | {
        "optimizer_type": draw(st.one_of(st.sampled_from(OPTIMIZERS), texts)),
        "optimizer_args": draw(st.lists(pairs(ARGUMENTS), max_size=2)) or None,
        "learning_rate": draw(st.sampled_from([1e-4, 0.0, 1.0, 1e30])),
        "lr_scheduler": draw(st.sampled_from(SCHEDULES)),
        "lr_scheduler_type": draw(st.one_of(st.just(""), st.just(""), st.sampled_from(CLASSES), texts)),
        "lr_scheduler_args": draw(st.lists(pairs(CLASS_ARGUMENTS), max_size=2)) or None,
        "lr_scheduler_num_cycles": draw(st.integers(0, 10**6)),
        "lr_scheduler_power": draw(st.sampled_from([1.0, 0.0, 0.5, 1e3])),
        "lr_warmup_steps": draw(st.sampled_from([0, 0.5, 3, 10**9])),
        "lr_decay_steps": draw(st.sampled_from([0, 0.5, 3, 10**9])),
        "lr_scheduler_min_lr_ratio": draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
    }
    options = TrainOptions.from_args(argparse.Namespace(**args))

    def make() -> None:
        groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "lr": options.optimizer.learning_rate}]
        with mute_logging():
            schedule = build_schedule(options.schedule, build_optimizer(options.optimizer, groups), 10)
            take_first_step(options.schedule, schedule)

    works_or_says_why(make)


# Values of every type in other trainers' configurations are translated, listed as without an equal, or refused.

EXAMPLES = {f"{example.program} {example.form}": example for example in reversed(list_examples())}


def translate_file(path: Path) -> None:
    """Translate a file as tools/translate.py does."""
    configuration = read_configuration(path, "config")
    if configuration is not None:
        translation = translate(configuration)
        describe(translation, path, render_files(translation, path, TranslatedFiles(path.with_name("x.toml"))))


@pytest.mark.parametrize("name", EXAMPLES)
@any_input(40)
@given(data=st.data())
def test_any_value_in_a_configuration(name: str, data: st.DataObject, tmp_path: Path) -> None:
    example: Example = EXAMPLES[name]
    part = "options" if example.form == "command" else "content"
    valid = getattr(example, part)
    place = data.draw(st.sampled_from([path for path in places(valid) if path]))
    changed = with_value(valid, place, data.draw(values))
    path = replace(example, **{part: changed}).write(tmp_path)
    works_or_says_why(lambda: translate_file(path))


# The fuzz tests with ten thousand examples in total, different ones each time.

ALL_EXAMPLES = 10_000


@pytest.mark.nightly
def test_ten_thousand_examples_end_without_a_traceback() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not nightly", "tests/fuzz"]
    listed = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True)
    num_tests = len(re.findall(r"::test_", listed.stdout))
    environment = {**os.environ, "FUZZ_EXAMPLES": str(-(-ALL_EXAMPLES // num_tests))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:]
