"""--audit_only: every picture is looked at, without a base model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from library.training.command_line import audit_only as module
from library.training.report_page.page import data_of
from library.training.reporting.events import Event
from tests.running import ROOT, SCRIPTS, Finished, make_pictures

Train = Callable[..., Finished]


@pytest.mark.parametrize("script", ["train_network", "flux_train_network"])
def test_what_stands_out_is_logged_and_shown(
    train: Train, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script in SCRIPTS
    folder = make_pictures(tmp_path / "data" / "1_<b>thing", 4, side=96, seed=12)
    Image.new("RGB", (96, 96), (9, 90, 9)).save(folder / "green.png")
    with Image.open(folder / "01.png") as image:
        image.resize((80, 80)).save(folder / "copy.jpg", quality=60)
    told: list[Event] = []
    monkeypatch.setattr(module, "record_of", lambda events, make=module.record_of: told.extend(events) or make(events))
    arguments = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--caption_extension", ".txt"]
    done = train([*arguments, "--audit_only", "--output_dir", str(tmp_path / "out"), "--output_name", "cat"], script)
    assert done.status == 0, done.stderr
    assert "1 image of a single colour" in done.stderr
    assert "2 images near-duplicated" in done.stderr and "copy.jpg (group 1)" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat-audit.html"]
    page = (tmp_path / "out" / "cat-audit.html").read_text(encoding="utf-8")
    shown = data_of(page)["findings"]
    assert [one["num_pictures"] for one in shown][:2] == [1, 2]
    assert all(p["thumbnail"].startswith("data:image/webp;base64,") for one in shown for p in one["pictures"])
    schema = Draft202012Validator(json.loads((ROOT / "docs" / "events.schema.json").read_text(encoding="utf-8")))
    for event in told:
        schema.validate(json.loads(json.dumps(module.plain(event.as_line(1.0)))))


def test_nothing_is_written_without_a_place_and_good_pictures_are_said_to_be(
    train: Train, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "inspect", lambda samples, num_trained, storage: [])
    before = sorted(pictures.rglob("*"))
    done = train(
        ["--train_data_dir", str(pictures), "--resolution", "64", "--caption_extension", ".txt", "--audit_only"]
    )
    assert done.status == 0 and "no problems found in the images" in done.stderr
    assert sorted(pictures.rglob("*")) == before
