"""Events in files, and --errors_json."""

import argparse
import importlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

import train_network
from library.base.errors import (
    NoDataFound,
    NotThere,
    UserError,
    about,
    error_in,
    flagged,
    list_few,
    naming,
    needing,
    of_file,
    reason_of,
)
from library.data.description.dataset_file import load_dataset_config
from library.options.train import TrainOptions
from library.training.command_line.cli import CommandLine, check_training, check_words
from library.training.command_line.main import report_error
from library.training.failures.failure import StoppedByError
from library.training.failures.nonfinite import NonFiniteError
from library.training.reporting.error_fields import describe_error, find_setting, wants_error_line
from library.training.reporting.event_stream import Events, capture_warnings, open_event_file, plain
from library.training.reporting.events import Removed, Saved, StageProgress
from library.training.run.run_events import hide_secrets, open_events
from library.training.saving.names import Names
from library.training.saving.rescue import NotWrittenError
from tests.running import ROOT, SCRIPTS, make_images
from tests.schemas import EVENTS, PAGES, make_events, to_text

FOREVER = """
import sys
from pathlib import Path
from library.training.reporting.event_stream import Events, open_event_file
from library.training.reporting.events import Removed
events = Events([open_event_file(Path(sys.argv[1]), False)])
print("going", flush=True)
while True:
    events.emit(Removed("x" * 3000))
    events.flush()
"""


class Kept:
    """A sink in memory that fails from the given call on."""

    name = "--log_events here"

    def __init__(self, fails_at: int | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.is_closed = False
        self._fails_at = fails_at

    def take(self, lines: Sequence[dict[str, Any]]) -> None:
        if self._fails_at is not None and len(self.lines) >= self._fails_at:
            raise OSError(28, "No space left on device")
        self.lines += lines

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_schemas_are_those_of_the_classes(path: Path) -> None:
    """`python -m tests.schemas` writes them."""
    assert path.read_text(encoding="utf-8") == to_text(PAGES[path]()) + "\n"


@pytest.mark.parametrize(
    "change", [{}, {"more": 1}, {"num_bytes": -1}, {"kind": "other"}, {"file": None}, {"step": 1.5}, {"epoch": ...}]
)
def test_the_schema_refuses_other_fields_and_values(change: dict[str, Any]) -> None:
    line = {**Saved("weights", "end", 3, 1, "mine.safetensors", 7).as_line(1.0), **change}
    line = {name: value for name, value in line.items() if value is not ...}
    schema = make_events()
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(line) == (not change)


def test_the_documentation_page_names_every_event() -> None:
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    assert all(f"| `{kind.event}` |" in page for kind in EVENTS)


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"a": (1.5, float("nan")), "b": {"c": float("-inf"), 2: Path("x")}}
    assert plain(value) == {"a": [1.5, None], "b": {"c": None, "2": "x"}}


def test_a_failing_sink_is_dropped_and_others_continue(caplog: pytest.LogCaptureFixture) -> None:
    broken, working = Kept(fails_at=1), Kept()
    events = Events([broken, working])
    for name in ("a", "b", "c"):
        events.emit(Removed(name))
        events.flush()
    events.end("stopped")
    events.emit(Removed("too late"))
    assert [line.get("file") for line in working.lines] == ["a", "b", "c", None] and working.is_closed
    assert [line["file"] for line in broken.lines] == ["a"]
    assert caplog.text.count("is dropped, training continues") == 1


def test_progress_is_sent_once_a_second_but_begin_and_end_always() -> None:
    now, sink = [100.0], Kept()
    events = Events([sink], clock=lambda: now[0])
    events.tell_progress("caching", "begin", 0, 50)
    for done in range(1, 51):
        now[0] += 0.125
        events.tell_progress("caching", "progress", done, 50)
    events.tell_progress("caching", "end", 50, 50)
    events.close()
    assert [line["done"] for line in sink.lines] == [0, 8, 16, 24, 32, 40, 48, 50]
    assert {line["total"] for line in sink.lines} == {50}


def test_earlier_warnings_are_sent_when_events_start() -> None:
    sink = Kept()
    with capture_warnings() as warnings:
        logging.getLogger("library.somewhere").warning("early %d", 1)
        events = Events([sink])
        warnings.connect(events)
        logging.getLogger("library.somewhere").error("late")
        logging.getLogger("library.somewhere").info("no matter")
        events.close()
    warned = [(line["level"], line["logger"], line["text"]) for line in sink.lines]
    assert warned == [("warning", "library.somewhere", "early 1"), ("error", "library.somewhere", "late")]


def test_warnings_of_a_run_without_events_are_not_stored() -> None:
    options, sink = TrainOptions().with_values({"output_dir": "out", "no_report": True}), Kept()
    names = Names.build(options.saving)
    with capture_warnings() as warnings, open_events(options, names, None, warnings) as silent:
        logging.getLogger("library.somewhere").warning("an hour later")
        assert not silent.is_on
        events = Events([sink])
        warnings.connect(events)
        events.close()
    assert sink.lines == []


def test_a_process_ended_by_another_thread_reports_that_it_was_stopped() -> None:
    """`Interruption` does so if the main thread is blocked inside torch; logging is shut down first."""
    sink = Kept()
    with capture_warnings() as warnings:
        warnings.connect(Events([sink]))
        logging.getLogger("library.somewhere").error("SIGINT received")
        ending = threading.Thread(target=warnings.close)
        ending.start()
        ending.join()
    assert [line["event"] for line in sink.lines] == ["warning", "end"] and sink.lines[-1]["reason"] == "stopped"
    assert sink.is_closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_sends_no_events() -> None:
    sink = Kept()
    events = Events([sink])
    child = os.fork()
    if child == 0:
        events.emit(Removed("of the child"))
        events.close()
        os._exit(0)
    os.waitpid(child, 0)
    events.emit(Removed("of the run"))
    events.close()
    assert [line["file"] for line in sink.lines] == ["of the run"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_second_process_continues_the_lines_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    process = subprocess.Popen([sys.executable, "-c", FOREVER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"going\n"
    while path.stat().st_size < 100_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    complete_lines = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    path.write_bytes(complete_lines + b'{"v":1,"event":"remo')  # at worst
    events = Events([open_event_file(path, goes_on=True)])
    events.emit(StageProgress("späte Zeile \ud800", "end"))
    events.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:-1]) == complete_lines and all(json.loads(line)["v"] == 1 for line in lines)
    assert json.loads(lines[-1])["name"] == "späte Zeile \ud800"


def test_passwords_and_tokens_are_hidden_in_the_command() -> None:
    options = TrainOptions().with_values({"wandb_api_key": "abc", "huggingface_token": "hf_1=2"})
    command = ["--wandb_api_key", "abc", "--huggingface_tok=hf_1=2", "--output_name", "abcd"]
    hidden = ["--wandb_api_key", "***", "--huggingface_tok=***", "--output_name", "abcd"]
    assert hide_secrets(command, options) == hidden


# --errors_json: one line with the fields of the error that ends a command.

Check = Callable[..., tuple[int, dict[str, Any] | None, str]]
FIELDS = ("message", "remedy", "setting", "others", "file", "path", "place", "cause")


def read_line(text: str) -> dict[str, Any] | None:
    """Return the fields of the only line of JSON, which is the last one; None if there is none."""
    lines = [line for line in text.splitlines() if line.startswith('{"error":')]
    if not lines:
        return None
    assert lines == text.splitlines()[-1:]
    fields: dict[str, Any] = json.loads(lines[0])["error"]
    assert tuple(fields) == FIELDS
    return fields


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Check:
    """Check a command line as train_network.py does, and return (exit status, fields, standard error)."""

    def run(*words: str) -> tuple[int, dict[str, Any] | None, str]:
        if not (tmp_path / "data").exists():
            make_images(tmp_path / "data" / "1_cat", 2)
        base = ["--pretrained_model_name_or_path", "owner/model", "--train_data_dir", str(tmp_path / "data")]
        more = ["--resolution", "64", "--network_module", "networks.lora", "--output_dir", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as end:
            options = SCRIPTS["train_network"].options
            check_words(train_network.setup_parser(), partial(check_training, options), [*base, *more, *words])
        errors = capfd.readouterr().err
        return int(end.value.code or 0), read_line(errors), errors

    return run


REFUSED: Mapping[str, tuple[list[str], int, dict[str, Any]]] = {
    "an unknown option": (["--sead", "3"], 2, {"setting": "--sead", "cause": "wrong value"}),
    "a value of another type": (["--seed", "x"], 2, {"setting": "--seed", "cause": "wrong value"}),
    "no choice": (["--mixed_precision", "fp7"], 2, {"setting": "--mixed_precision", "cause": "wrong value"}),
    "no value": (["--seed"], 2, {"setting": "--seed"}),
    "a range": (["--network_dropout", "3"], 1, {"setting": "--network_dropout", "cause": "wrong value", "file": None}),
    "a missing part": (
        ["--vae", "no.safetensors"],
        1,
        {"setting": "--vae", "cause": "missing", "path": "no.safetensors"},
    ),
    "a need": (
        ["--dim_from_weights"],
        1,
        {"setting": "--dim_from_weights", "others": ["--network_weights"], "cause": "needs"},
    ),
    "an exclusion": (
        ["--network_train_unet_only", "--network_train_text_encoder_only"],
        1,
        {
            "setting": "--network_train_unet_only",
            "others": ["--network_train_text_encoder_only"],
            "cause": "does not fit",
        },
    ),
    "a missing config file": (["--config_file", "no.toml"], 1, {"setting": "--config_file", "cause": "missing"}),
    "a recipe": (["--recipe", "no"], 1, {"setting": "--recipe"}),
    "a need of argparse's kind": (["--output_config"], 2, {"setting": "--output_config", "cause": "needs"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_command_line_says_which_option(case: str, check: Check) -> None:
    words, status, expected = REFUSED[case]
    found, fields, _ = check(*words, "--errors_json")
    assert found == status and fields is not None
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_printed_without_the_option(case: str, check: Check) -> None:
    words, status, _ = REFUSED[case]
    found, fields, errors = check(*words)
    assert found == status and fields is None and errors


@pytest.mark.parametrize("case", REFUSED)
def test_only_the_main_process_prints(case: str, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    words, status, _ = REFUSED[case]
    found, fields, _ = check(*words, "--errors_json")
    assert found == status and fields is None


def test_a_file_of_options_is_named_with_the_place(check: Check, tmp_path: Path) -> None:
    config = tmp_path / "my train.toml"
    config.write_text("errors_json = true\nnetwork_dropout = 3.0\n")
    _, fields, _ = check("--config_file", str(config))
    assert fields is not None and (fields["setting"], fields["file"]) == ("--network_dropout", str(config))
    assert fields["place"] == "line 2"
    _, fields, _ = check("--config_file", str(config), "--network_dropout", "4")
    assert fields is not None and (fields["setting"], fields["file"]) == ("--network_dropout", None)
    config.write_text("errors_json = true\nseed = 'x'\n")
    _, fields, _ = check("--config_file", str(config))
    assert fields is not None and (fields["setting"], fields["file"]) == ("--seed", str(config))
    config.write_text("seed = 3\nname = \n")
    _, fields, _ = check("--config_file", str(config), "--errors_json")
    assert fields is not None
    assert (fields["path"], fields["place"], fields["cause"]) == (str(config), "line 2, column 8", "unreadable")
    config.write_text("errors_json = true\n")
    status, fields, _ = check("--config_file", str(config), "--sead", "3")
    assert status == 2 and fields is not None and fields["setting"] == "--sead"


def test_passwords_are_hidden(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_in_the_environment")
    for words in (
        ["--huggingface_tokn", "hf_secret"],
        ["--huggingface_tokn=hf_secret"],
        ["--wandb_api_key", "hf_secret", "--vae", "hf_secret.safetensors"],
        ["--vae", "hf_in_the_environment.safetensors"],
    ):
        _, fields, _ = check(*words, "--errors_json")
        text = json.dumps(fields)
        assert fields is not None and "hf_secret" not in text and "environment" not in text


def line_of(error: Exception, capfd: pytest.CaptureFixture[str], **values: Any) -> dict[str, Any]:
    args = argparse.Namespace(**{"errors_json": True, "pretrained_model_name_or_path": None, **values})
    report_error(error, CommandLine(train_network.setup_parser(), [], args, ()))
    fields = read_line(capfd.readouterr().err)
    assert fields is not None
    return fields


def test_a_bug_has_its_type_in_the_message_and_no_setting(capfd: pytest.CaptureFixture[str]) -> None:
    fields = line_of(KeyError("step\nof two lines"), capfd)
    assert fields == {**dict.fromkeys(FIELDS), "message": "KeyError: 'step\\nof two lines'", "others": []}


def test_an_error_of_the_system_has_its_path(capfd: pytest.CaptureFixture[str]) -> None:
    fields = line_of(PermissionError(13, "Permission denied", "/models/x"), capfd, vae="/models")
    assert (fields["path"], fields["cause"], fields["setting"]) == ("/models/x", "unreadable", "--vae")


def test_the_error_is_told_and_not_what_was_saved(capfd: pytest.CaptureFixture[str]) -> None:
    stopped = StoppedByError("saved as x")
    stopped.__cause__ = about("--vae")("gives NaN")
    assert line_of(stopped, capfd)["setting"] == "--vae"


def test_the_flag_is_the_one_that_was_typed(capfd: pytest.CaptureFixture[str]) -> None:
    error = about("--pretrained_model_name_or_path", "x.safetensors")("is of another model")
    assert line_of(error, capfd, dit="x.safetensors")["setting"] == "--dit"


def test_a_file_belongs_to_the_nearest_option_that_names_it(tmp_path: Path) -> None:
    values = {"train_data_dir": tmp_path, "vae": tmp_path / "vae", "reg": [tmp_path / "a", tmp_path / "b"], "seed": 3}
    names = ("train_data_dir", "vae", "reg", "absent")
    path = {name: str(tmp_path / name) for name in ("vae", "vae/config.json", "vae2", "b/c", "../x")}
    assert [find_setting(text, values, names) for text in path.values()] == [
        "--vae",
        "--vae",
        "--train_data_dir",
        "--reg",
        None,
    ]


def test_the_option_is_found_before_a_command_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[any]\nerrors_json = true\n")
    config = ["--config_file", str(tmp_path / "c.toml")]
    assert wants_error_line(["--errors_json"]) and wants_error_line(["--x", *config])
    for words in ([], ["--errors_json=1"], ["--errors"], ["--config_file"], ["--config_file", "no.toml"]):
        assert not wants_error_line(words)


@pytest.mark.parametrize(
    "error",
    [
        error_in("--b", path="c", place="line 1", cause="needs", others=["--e"])("a", "d"),
        about("--vae", kind=NotThere)("is missing"),
        NoDataFound("use --dataset_config"),
        NonFiniteError("a", (1, 2)),
        NotWrittenError("no place"),
        of_file("a.png")(": it is damaged"),
    ],
    ids=repr,
)
def test_an_error_is_the_same_in_another_process(error: UserError) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error) and str(copied) == str(error) and vars(copied) == vars(error)


def test_the_text_is_message_and_remedy() -> None:
    error = error_in()("--seed is x", "use a number")
    assert (str(error), error.message, error.remedy) == ("--seed is x; use a number", "--seed is x", "use a number")
    error = about("--vae", "a b.safetensors")("is of another model")
    assert str(error) == "--vae a b.safetensors is of another model" and reason_of(error) == "is of another model"
    assert str(about("--vae")(": it is empty")) == "--vae: it is empty"
    error = about("--output_name:", "a.safetensors")("exists", "use another name")
    assert str(error) == "--output_name: a.safetensors exists; use another name" and error.setting == "--output_name"
    assert reason_of(error) == "exists; use another name"
    assert reason_of(OSError("x ")) == "x" and list_few(["a"]) == "a"


def test_deeper_raises_come_first() -> None:
    with pytest.raises(UserError) as caught, naming("--a", "outer", place="there", cause="missing"):
        raise error_in(path="inner")("x")
    error = caught.value
    assert (error.setting, error.path, error.place, error.cause) == ("--a", "inner", "there", "missing")
    with pytest.raises(UserError) as caught, naming("--a", "outer", cause="missing"), naming("--b"):
        raise UserError("x")
    assert (caught.value.setting, caught.value.path, caught.value.cause) == ("--b", None, None)
    with pytest.raises(UserError) as caught, naming("--dataset_config", "d.toml", file="d.toml"):
        raise error_in("num_repeats")("x")
    assert (caught.value.setting, caught.value.file) == ("num_repeats", "d.toml")


def test_prefixes_keep_the_fields() -> None:
    with pytest.raises(UserError) as caught, needing("previews need it"):
        raise about("--vae", kind=NotThere)("is missing")
    assert type(caught.value) is UserError and str(caught.value) == "previews need it: --vae is missing"
    assert (caught.value.setting, caught.value.cause) == ("--vae", "missing")
    with pytest.raises(UserError) as caught, flagged("--vae", "a"), flagged("--other"):
        raise of_file("a")("is empty")
    assert str(caught.value) == "--other: a is empty" and caught.value.setting == "--other"


def test_an_error_of_a_worker_process_keeps_its_fields(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(Failing(), batch_size=None, num_workers=1)
    (error,) = loader
    assert isinstance(error, UserError) and (error.path, error.setting) == ("a.png", None)


class Failing(torch.utils.data.Dataset[UserError]):
    """A data set that returns an error, as `BatchMaker` does."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> UserError:
        if number:
            raise IndexError
        return of_file("a.png")("is damaged")


@pytest.mark.parametrize(
    ("lines", "setting", "place", "cause"),
    [
        ("resolution = 64", "num_repeat", "line 5", "wrong value"),
        ("resolution = 64\nbatch_size = 'x'", "batch_size", "line 3", "wrong value"),
        ("", "resolution", "data['datasets'][0]", "missing"),
        ("resolution = 64", "is_forgetting_probe", "line 6", "does not fit"),
    ],
)
def test_a_key_of_the_dataset_file_is_named_with_its_line_or_table(
    lines: str, setting: str, place: str, cause: str, tmp_path: Path
) -> None:
    keys = {"num_repeat": "num_repeat = 2", "is_forgetting_probe": "is_reg = true\nis_forgetting_probe = true"}
    path = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = 'x'\n{keys.get(setting, '')}"
    path.write_text(f"[[datasets]]\n{lines}\n{subset}\n")
    options = train_network.setup_parser().parse_args(["--dataset_config", str(path)])
    with pytest.raises(UserError) as raised:
        load_dataset_config(TrainOptions.from_args(options))
    fields = describe_error(raised.value, {}, ())
    assert (fields.setting, fields.place, fields.cause) == (setting, place, cause)
    assert fields.file == fields.path == str(path)
    assert (fields.remedy is not None) == (cause in ("missing", "does not fit"))


@pytest.mark.parametrize(
    ("command", "words", "status", "setting"),
    [
        ("tools.resize_lora", ["--model", "no.safetensors", "--save_to", "b.xyz", "--new_rank", "4"], 1, "--save_to"),
        ("tools.merge_lora", ["--models", "a.safetensors", "--ratios", "x"], 2, None),
        ("train", ["--base", "no.safetensors", "photos", "mycat, a cat"], 1, "--base"),
        ("tools.draw", ["no.safetensors", "--prompt", "a cat"], 1, "MODEL"),
        ("tools.vote", ["--base", "no.safetensors", "--prompts", "no.txt"], 1, "--prompts"),
        ("tools.doctor", ["--output_dir"], 2, None),
        ("tools.front_end", ["no_folder"], 1, "folder"),
        ("tools.plan_memory", ["--cards", "x"], 1, "--cards"),
        ("tools.plan_memory", ["--script", "no.py"], 1, "--script"),
        ("tools.plan_memory", ["--script", "train_network.py", "--sead", "3"], 2, "--sead"),
        ("tools.run_queue", ["run", "--folder", "no_folder", "--gpus", "0,0"], 2, None),
        ("tools.run_queue", ["remove", "--folder", "no_folder", "1"], 1, "--folder"),
        ("tools.release", ["."], 1, None),
    ],
)
def test_tools_and_the_front_door_print_it_too(
    command: str, words: list[str], status: int, setting: str | None, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", [command, *words, "--errors_json"])
    try:
        found = importlib.import_module(command).main()
    except SystemExit as end:
        found = end.code
    fields = read_line(capfd.readouterr().err)
    assert found == status and fields is not None and fields["setting"] == setting and fields["cause"]
