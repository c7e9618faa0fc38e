"""Destinations of log lines and of values sent to trackers."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from library.base.errors import UserError
from library.options.output.console import ConsoleOptions
from library.options.output.trackers import TrackerOptions
from library.training.command_line.console import resolve_log_level
from library.training.reporting.progress import LossAverage
from library.training.reporting.sample_images import Drawn
from library.training.reporting.trackers import Charts, start_trackers, tracker_kind
from tests.parity.test_preview import prompt_of

ROOT = Path(__file__).parents[3]
CODE = """
import logging
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
for _ in range(2):
    setup_logging(ConsoleOptions({level!r}, {file!r}, {simple}))
logger = logging.getLogger("a")
logger.debug("detail")
logger.info("\\u5b66\\u7fd2 " + "x" * 200)
logger.warning("careful")
logger.warning("red \\x1b[31m%s", "\\x07")
"""
LONG = "学習 " + "x" * 200
ESCAPED = r"red \x1b[31m\x07"  # control characters in names and texts from files


def run(level: str | None = None, file: str | None = None, simple: bool = False) -> tuple[list[str], list[str]]:
    """Return the lines on standard output and standard error of a process with an ASCII-only locale."""
    code = CODE.format(level=level, file=file, simple=simple)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
    return done.stdout.decode("utf-8").splitlines(), done.stderr.decode("utf-8").splitlines()


def test_lines_in_a_pipe_go_to_standard_error_once_and_unwrapped() -> None:
    out, err = run()
    assert out == []
    assert [line.split(maxsplit=3)[2:] for line in err] == [
        ["INFO", LONG],
        ["WARNING", "careful"],
        ["WARNING", ESCAPED],
    ]


def test_simple_lines_go_to_standard_output() -> None:
    assert run(simple=True) == ([LONG, "WARNING: careful", f"WARNING: {ESCAPED}"], [])


def test_the_level_decides_which_lines_are_shown() -> None:
    assert run(level="ERROR") == ([], [])
    assert run(level="DEBUG", simple=True)[0][0] == "DEBUG: detail"


def test_the_log_file_gets_the_lines_and_is_truncated_first(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.log"
    path.parent.mkdir()
    path.write_text("old\n", encoding="utf-8")
    assert run(file=str(path), simple=True) == ([], [])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and lines[2].endswith(ESCAPED) and lines[0].endswith(LONG) and "WARNING" in lines[1]


def test_errors_go_to_the_file_and_once_to_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    code = f"""
import logging
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
setup_logging(ConsoleOptions(None, {str(path)!r}, True))
logging.warning("careful")
logging.error("it broke")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith("ERROR    it broke") and done.stdout == ""
    assert path.read_text(encoding="utf-8").splitlines()[1] == line


def test_an_unknown_level_in_a_config_file_is_refused() -> None:
    with pytest.raises(ValueError, match="--console_log_level is LOUD"):
        resolve_log_level(ConsoleOptions(console_log_level="LOUD"))


def test_no_level_hides_the_error_that_ends_a_run() -> None:
    assert resolve_log_level(ConsoleOptions(console_log_level="CRITICAL")) == logging.ERROR


@pytest.mark.parametrize(("level", "place"), [("None", "file"), ("'DEBUG'", "terminal"), ("None", "nowhere")])
def test_lines_that_nobody_can_act_on_go_to_the_file_only(tmp_path: Path, level: str, place: str) -> None:
    path = tmp_path / "log.txt" if place == "file" else None
    code = f"""
import logging, warnings
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
setup_logging(ConsoleOptions({level}, {None if path is None else str(path)!r}, False))
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from somewhere")
logging.getLogger("bitsandbytes.optim").warning("this matters")
warnings.warn("old name", FutureWarning)
warnings.warn("mind this", UserWarning)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = done.stderr if path is None else path.read_text(encoding="utf-8")
    assert "this matters" in shown and "mind this" in shown
    assert ("gemm_4bit" in shown, "old name" in shown) == (place != "nowhere",) * 2


# Values sent to trackers.


class Tracker:
    """A stand-in for one of accelerate's trackers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.logged: list[Any] = []
        self.is_finished = False

    def finish(self) -> None:
        self.is_finished = True

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def log_images(self, values: dict[str, Any], step: int, **keywords: Any) -> None:
        self.logged.append(({name: value.shape for name, value in values.items()}, step, keywords))


def test_images_are_sent_to_every_tracker_in_its_own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb has its own step axis, so step and epoch are sent as values; its images are captioned with the prompt."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda image, caption: (image.size, caption)))
    trackers = [Tracker("wandb"), Tracker("tensorboard")]
    drawn = [Drawn(n, prompt_of(text=f"picture {n}"), Image.new("RGB", (8, 16))) for n in (0, 2)]
    charts = Charts(SimpleNamespace(trackers=trackers))
    charts.log_images(drawn, 30, 4)
    charts.log_images([], 31, 4)
    wandb, tensorboard = (tracker.logged for tracker in trackers)
    values = {"sample_0": ((8, 16), "picture 0"), "sample_2": ((8, 16), "picture 2"), "global_step": 30, "epoch": 4}
    assert wandb == [(values, None)]
    assert tensorboard == [({"sample_0": (1, 16, 8, 3), "sample_2": (1, 16, 8, 3)}, 30, {"dataformats": "NHWC"})]


@pytest.mark.parametrize("fails_at", ["log", "log_images", "finish"])
def test_a_failing_tracker_is_dropped_and_the_other_one_continues(
    fails_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    broken, working = Tracker("tensorboard"), Tracker("other")
    setattr(broken, fails_at, fail)
    ended: list[bool] = []
    charts = Charts(SimpleNamespace(trackers=[broken, working], end_training=lambda: ended.append(True)))
    drawn = [Drawn(0, prompt_of(text="a"), Image.new("RGB", (8, 16)))]
    for step in (1, 2):
        charts.log_step({"loss": 1.0}, step, 1)
        charts.log_images(drawn, step, 1)
    assert charts.are_on
    charts.close()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "charts of tensorboard are switched off, training continues: OSError: [Errno 28] No space left on device"
    ]
    assert len(working.logged) == 4 and working.is_finished and ended == [True]


def test_an_unwritable_folder_disables_the_charts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def init_trackers(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    accelerator = SimpleNamespace(trackers=[], init_trackers=init_trackers)
    start_trackers(accelerator, TrackerOptions(logging_dir=str(tmp_path)), {})
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"--logging_dir {tmp_path}: charts are off" in record.getMessage()
    assert not Charts(accelerator).are_on


@pytest.mark.parametrize("error", [RuntimeError("No API key configured.\nmore"), ConnectionError("no network")])
def test_a_wandb_that_refuses_ends_the_run_with_its_reason(error: Exception) -> None:
    def init_trackers(*arguments: Any, **keywords: Any) -> None:
        raise error

    with pytest.raises(UserError, match="wandb does not start") as caught:
        start_trackers(SimpleNamespace(init_trackers=init_trackers), TrackerOptions(log_with="wandb"), {})
    assert caught.value.setting == "--log_with" and "wandb login" in (caught.value.remedy or "")
    assert str(error).splitlines()[0] in caught.value.message and "more" not in caught.value.message


def test_the_folder_of_wandbs_runs_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies in the folder that runs are started in, which Python looks for modules in."""
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match="finds only the folder") as caught:
        tracker_kind(TrackerOptions(log_with="wandb"))
    assert (caught.value.path, caught.value.cause) == (str(tmp_path / "wandb"), "not installed")
    sys.modules.pop("wandb", None)


def test_wandb_writes_into_the_logging_folder(tmp_path: Path) -> None:
    """sd-scripts writes there too. A folder in --log_tracker_config takes precedence."""
    given: list[dict[str, Any]] = []
    accelerator = SimpleNamespace(
        logging_dir=tmp_path / "logs" / "run", init_trackers=lambda name, config, init_kwargs: given.append(init_kwargs)
    )
    config = tmp_path / "trackers.toml"
    config.write_text("[wandb]\ndir = 'other'\n", encoding="utf-8")
    for own in (None, str(config)):
        options = TrackerOptions(logging_dir=str(tmp_path / "logs"), log_with="wandb", log_tracker_config=own)
        start_trackers(accelerator, options, {})
    assert [init["wandb"] for init in given] == [{"dir": str(tmp_path / "logs" / "run")}, {"dir": "other"}]
    assert (tmp_path / "logs" / "run").is_dir()


# The running average of the loss.


def test_each_position_of_an_epoch_counts_with_its_last_loss() -> None:
    average = LossAverage()
    for place, loss in ((0, 1.0), (1, 3.0), (0, 2.0)):
        average.add(place, loss)
    assert average.mean == 2.5


def test_positions_that_a_smaller_dataset_lacks_are_dropped() -> None:
    average = LossAverage({0: 0.1, 1: 0.2, 2: 9.0}, 9.3)
    average.keep_batches_below(2)
    assert average.mean == pytest.approx(0.15, rel=1e-15)


def test_an_average_that_loses_no_position_is_bit_identical() -> None:
    total = 0.1 + 0.2 + 0.3  # not the correctly rounded sum
    average = LossAverage({0: 0.1, 1: 0.2, 2: 0.3}, total)
    average.keep_batches_below(3)
    assert average.total == total
