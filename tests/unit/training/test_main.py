"""The report of an error that ends a run."""

import argparse
import errno
import logging
from bdb import BdbQuit
from collections.abc import Callable
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.training.command_line.cli import CommandLine
from library.training.command_line.main import OUR_FAULT, report_error
from library.training.evaluation import preview
from library.training.models import opening
from tests.running import Finished


@pytest.mark.parametrize(
    ("typed", "flag"),
    [
        ({"dit": "x.safetensors", "pretrained_model_name_or_path": None}, "--dit"),
        ({"dit": None, "pretrained_model_name_or_path": "x.safetensors"}, "--pretrained_model_name_or_path"),
        ({"pretrained_model_name_or_path": "x.safetensors"}, "--pretrained_model_name_or_path"),
    ],
    ids=repr,
)
def test_the_error_names_the_base_model_flag_that_was_used(
    caplog: pytest.LogCaptureFixture, typed: dict[str, str | None], flag: str
) -> None:
    error = UserError("--pretrained_model_name_or_path x.safetensors does not exist")
    report_error(error, CommandLine(argparse.ArgumentParser(), [], argparse.Namespace(**typed), []))
    assert caplog.messages == [f"{flag} x.safetensors does not exist"]


def shown(caplog: pytest.LogCaptureFixture, error: Exception) -> list[logging.LogRecord]:
    with caplog.at_level(logging.INFO):
        try:
            raise error
        except Exception as caught:
            report_error(caught)
    return caplog.records


@pytest.mark.parametrize(
    "error",
    [
        UserError("--seed is x; use a number"),
        PermissionError(errno.EACCES, "Permission denied", "data.toml"),
        OSError(errno.ENOSPC, "No space left on device", "out/a.safetensors"),
    ],
    ids=repr,
)
def test_a_user_error_is_one_sentence_without_a_traceback(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    (record,) = shown(caplog, error)
    assert record.getMessage() == str(error) and record.exc_info is None


@pytest.mark.parametrize("make", [lambda: int("x"), lambda: dict(zip([1], [], strict=True)), lambda: {}["key"]])
def test_an_internal_error_keeps_its_traceback_and_asks_for_a_report(caplog: pytest.LogCaptureFixture, make) -> None:
    try:
        make()
    except Exception as error:
        record, advice = shown(caplog, error)
    assert record.exc_info is not None and type(record.exc_info[1]).__name__ in record.getMessage()
    assert advice.getMessage() == OUR_FAULT


NO_BUGS = {
    "numpy's": (MemoryError("Unable to allocate 3.00 GiB for an array"), "out of memory"),
    "torch's": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of m"),
    "a fork's": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    "a library's": (ImportError("libx.so: failed to map segment from shared object"), "probably out of memory"),
    "a thread's": (RuntimeError("can't start new thread"), "probably out of memory"),
    "Python's": (SystemError("error return without exception set"), "probably out of memory"),
    "a debugger's": (BdbQuit(), "the debugger ended the run"),
}


@pytest.mark.parametrize("case", NO_BUGS)
def test_memory_that_runs_out_and_a_debuggers_quit_are_no_bugs(caplog: pytest.LogCaptureFixture, case: str) -> None:
    error, start = NO_BUGS[case]
    (record,) = shown(caplog, error)
    assert record.getMessage().startswith(start) and record.exc_info is None
    if str(error):
        assert f"the error itself: {error}" in record.getMessage()


def test_thread_local_storage_that_runs_out_is_not_called_memory(caplog: pytest.LogCaptureFixture) -> None:
    shown(caplog, ImportError("libgomp.so.1: cannot allocate memory in static TLS block"))
    assert caplog.messages[-1] == OUR_FAULT


@pytest.mark.slow
@pytest.mark.parametrize("case", ["numpy's", "a debugger's"])
@pytest.mark.parametrize("place", [(opening, "open_training_data"), (preview, "draw_latents")], ids=["data", "preview"])
def test_a_run_ends_by_them_wherever_they_are_raised(
    train: Callable[..., Finished], base_arguments: list[str], monkeypatch: pytest.MonkeyPatch, case: str,
    place: tuple[object, str], tmp_path: Path,
) -> None:  # fmt: skip
    error, start = NO_BUGS[case]

    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(*place, fail)
    is_preview_without_memory = place[0] is preview and isinstance(error, MemoryError)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1")
    prompts = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first"]
    done = train([*base_arguments, *prompts, "--max_train_steps", "1"])
    assert done.status == (0 if is_preview_without_memory else 1), done.stderr
    assert (start in done.stderr) is not is_preview_without_memory
    assert OUR_FAULT not in done.stderr and "Traceback" not in done.stderr
