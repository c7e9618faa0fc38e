"""The report of an error that ends a run."""

import argparse
import errno
import logging

import pytest

from library.errors import UserError
from library.training.command_line.main import OUR_FAULT, report_error


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
    report_error(UserError("--pretrained_model_name_or_path x.safetensors does not exist"), argparse.Namespace(**typed))
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
