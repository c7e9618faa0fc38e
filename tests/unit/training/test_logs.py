"""What the trackers get."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from library.training.logs import Charts
from library.training.pictures import Drawn
from tests.parity.test_preview import prompt_of


class Tracker:
    """Stands for one of accelerate's trackers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.logged: list[Any] = []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def log_images(self, values: dict[str, Any], step: int, **keywords: Any) -> None:
        self.logged.append(({name: value.shape for name, value in values.items()}, step, keywords))


def test_pictures_reach_every_tracker_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb keeps its own axis, so that step and epoch are values; its pictures have the prompt beneath."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda image, caption: (image.size, caption)))
    trackers = [Tracker("wandb"), Tracker("tensorboard")]
    drawn = [Drawn(n, prompt_of(text=f"picture {n}"), Image.new("RGB", (8, 16))) for n in (0, 2)]
    charts = Charts(SimpleNamespace(trackers=trackers))
    charts.log_pictures(drawn, 30, 4)
    charts.log_pictures([], 31, 4)
    wandb, tensorboard = (tracker.logged for tracker in trackers)
    values = {"sample_0": ((8, 16), "picture 0"), "sample_2": ((8, 16), "picture 2"), "global_step": 30, "epoch": 4}
    assert wandb == [(values, None)]
    assert tensorboard == [({"sample_0": (1, 16, 8, 3), "sample_2": (1, 16, 8, 3)}, 30, {"dataformats": "NHWC"})]
