"""Values sent to trackers."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from library.base.errors import UserError
from library.options.output.trackers import TrackerOptions
from library.training.reporting.sample_images import Drawn
from library.training.reporting.trackers import Charts, start_trackers, tracker_kind
from tests.parity.test_preview import prompt_of


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
