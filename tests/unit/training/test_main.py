"""How an error that ends a run is shown."""

import errno
import logging

import pytest

from library.errors import UserError
from library.training.command_line.main import OUR_FAULT, report_error


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
def test_what_the_user_can_put_right_is_one_sentence(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    (record,) = shown(caplog, error)
    assert record.getMessage() == str(error) and record.exc_info is None


@pytest.mark.parametrize("make", [lambda: int("x"), lambda: dict(zip([1], [], strict=True)), lambda: {}["key"]])
def test_a_fault_of_ours_keeps_its_traceback_and_says_so(caplog: pytest.LogCaptureFixture, make) -> None:
    try:
        make()
    except Exception as error:
        record, advice = shown(caplog, error)
    assert record.exc_info is not None and type(record.exc_info[1]).__name__ in record.getMessage()
    assert advice.getMessage() == OUR_FAULT
