"""Votes in a browser on images of a tiny model, and the documented preference training on them."""

import json
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Timer
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from library.training.report_page.local_server import LocalServer, TakeForm
from library.training.report_page.page import build_page
from tests.browser import WATCH, in_browser, opened, with_scripts
from tests.contracts.test_docs_commands import ROOT, commands_of
from tests.running import Finished
from tests.tiny.bases import BASES
from tools import vote

PROMPTS = "a red circle --w 64 --h 64 --s 1\na blue square --w 64 --h 64 --s 1\na <b>dog --w 64 --h 64 --s 1\n"
# Votes as soon as the images of a page are there, and sends in the end what the pages showed.
PRESS = """
addEventListener("load", async () => {
  const images = [...document.querySelectorAll("img")];
  await Promise.all(images.map((one) => one.decode()));
  const shown = JSON.parse(sessionStorage.shown ?? "[]");
  const [left, right] = images.map((one) => one.getBoundingClientRect());
  const sizes = images.map((one) => one.naturalWidth);
  shown.push([document.querySelector("h1").textContent, sizes, images.length && left.right <= right.left, window.told]);
  sessionStorage.shown = JSON.stringify(shown);
  const key = ["ArrowRight", "ArrowLeft", "ArrowDown", ""][shown.length - 1];
  for (const repeat of [true, false]) dispatchEvent(new KeyboardEvent("keydown", {key, repeat, cancelable: true}));
  if (!key) {
    const form = Object.assign(document.createElement("form"), {method: "post"});
    form.append(Object.assign(document.createElement("input"), {name: "shown", value: sessionStorage.shown}));
    document.body.append(form);
    form.submit();
  }
});
"""


class Browsed(LocalServer):
    """Shows its pages to a browser until that sends what they showed, for ten minutes at most."""

    shown: ClassVar[list[Any]] = []

    def __init__(self, pages: vote.VotingPages, port: int, take: TakeForm) -> None:
        def take_shown(fields: Mapping[str, str]) -> bool:
            if "shown" not in fields:
                return take(fields)
            self.shown[:] = json.loads(fields["shown"])
            super(Browsed, self).shutdown()
            return True

        super().__init__(pages, port, take_shown)

    def shutdown(self) -> None:
        """Go on after the last vote: the page that says so is to send what it shows."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        deadline = Timer(600, super().shutdown)
        deadline.start()
        with tempfile.TemporaryDirectory() as profile, opened(self.url, Path(profile)):
            super().serve_forever(poll_interval)
        deadline.cancel()


@in_browser
def test_votes_by_key_become_the_data_of_the_documented_training(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = BASES["sdxl"].build(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(PROMPTS)

    def pressed_page(title: str, script: str, data: Mapping[str, Any]) -> str:
        return with_scripts(build_page(title, script, data), WATCH, PRESS)

    monkeypatch.setattr(vote, "LocalServer", Browsed)
    monkeypatch.setattr(vote, "build_page", pressed_page)
    model = base[base.index("--pretrained_model_name_or_path") + 1]
    assert vote.main(["--base", model, "--prompts", "prompts.txt", "--output", "pictures"]) == 0

    texts = ["a red circle", "a blue square", "a <b>dog"]
    assert Browsed.shown == [*([text, [64, 64], True, []] for text in texts), ["All pairs are voted", [], 0, []]]
    assert sorted(path.name for path in Path("pictures/preferred").iterdir()) == [
        "01_1.png",
        "01_1.txt",
        "03_1.png",
        "03_1.txt",
    ]
    assert [path.name for path in Path("pictures/skipped").iterdir()] == ["05_1.png"]
    assert Path("pictures/preferred/03_1.txt").read_text() == "a blue square"
    for voted, drawn in {
        "preferred/01_1": "02_2",
        "rejected/01_1": "01_1",
        "preferred/03_1": "03_1",
        "rejected/03_1": "04_2",
    }.items():
        images = (Image.open(f"pictures/{name}.png") for name in (voted, f"candidates/{drawn}"))
        one, other = map(np.asarray, images)
        assert np.array_equal(one, other)

    example = (ROOT / "configs/examples/preferences.toml").read_text()
    Path("data.toml").write_text(example.replace("resolution = 1024", "resolution = 64\nmin_bucket_reso = 64"))
    command = next(line for line in commands_of(ROOT / "docs/preferences.md") if "sdxl_train_network.py" in line)
    words = shlex.split(command)[2:]
    changes = {
        "--dataset_config": ["data.toml"],
        "--pretrained_model_name_or_path": [model],
        "--max_train_steps": ["2"],
    }
    for flag, values in changes.items():
        at = words.index(flag)
        words[at + 1 : at + 2] = values
    words[words.index("--mixed_precision") + 1] = "no"
    done = train(words, script="sdxl_train_network")
    assert done.status == 0, done.stderr
    assert "one partner in pictures/rejected for each image" in done.stderr
    assert done.losses[0] == 0.693 and Path("output/preferred/preferred.safetensors").is_file()
