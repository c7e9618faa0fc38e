"""--audit_only: every image is looked at, without a base model."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from library.training.command_line import audit_only as module
from library.training.report_page.page import read_data
from library.training.reporting.events import Event
from tests.running import ROOT, SCRIPTS, Finished, make_images

Train = Callable[..., Finished]


@pytest.mark.parametrize("script", ["train_network", "flux_train_network"])
def test_what_stands_out_is_logged_and_shown(
    train: Train, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script in SCRIPTS
    folder = make_images(tmp_path / "data" / "1_<b>thing", 4, side=96, seed=12)
    Image.new("RGB", (96, 96), (9, 90, 9)).save(folder / "green.png")
    with Image.open(folder / "01.png") as image:
        image.resize((80, 80)).save(folder / "copy.jpg", quality=60)
    told: list[Event] = []
    monkeypatch.setattr(
        module, "collect_events", lambda events, make=module.collect_events: told.extend(events) or make(events)
    )
    arguments = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--caption_extension", ".txt"]
    done = train([*arguments, "--audit_only", "--output_dir", str(tmp_path / "out"), "--output_name", "cat"], script)
    assert done.status == 0, done.stderr
    assert "1 image of a single colour" in done.stderr
    assert "2 images near-duplicated" in done.stderr and "copy.jpg (group 1)" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat-audit.html"]
    page = (tmp_path / "out" / "cat-audit.html").read_text(encoding="utf-8")
    shown = read_data(page)["findings"]
    assert [one["num_pictures"] for one in shown][:2] == [1, 2]
    assert all(p["thumbnail"].startswith("data:image/webp;base64,") for one in shown for p in one["pictures"])
    schema = Draft202012Validator(json.loads((ROOT / "docs" / "events.schema.json").read_text(encoding="utf-8")))
    for event in told:
        schema.validate(json.loads(json.dumps(module.plain(event.as_line(1.0)))))


def test_kinds_of_files_crops_and_all_warnings_are_on_the_page(train: Train, tmp_path: Path) -> None:
    folder, rng = make_images(tmp_path / "data" / "1_cat", 3, side=96, seed=13), random.Random(14)

    def noise(mode: str, size: tuple[int, int]) -> Image.Image:
        return Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * len(mode)))

    noise("CMYK", (96, 96)).save(folder / "print.jpg")
    noise("RGBA", (96, 96)).save(folder / "logo.png")
    first, *rest = [noise("RGB", (96, 96)).quantize() for _ in range(3)]
    first.save(folder / "dance.webp", save_all=True, append_images=rest)
    noise("RGB", (400, 64)).save(folder / "wide.png")
    (folder / "scan.tiff").write_bytes(b"x")
    out = tmp_path / "out"
    config = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\ncaption_extension = '.txt'\n"
    config.write_text("".join(f"[[datasets]]\nresolution = {side}\n{subset}" for side in (64, 96)))
    done = train(["--dataset_config", str(config), "--audit_only", "--output_dir", str(out), "--output_name", "cat"])
    assert done.status == 0, done.stderr
    data = read_data((out / "cat-audit.html").read_text(encoding="utf-8"))
    found = {one["text"].partition(" ")[2][:24]: one["pictures"] for one in data["findings"]}
    named = {text: [Path(image["file"]).name for image in images] for text, images in found.items()}
    assert named["image animated; only the"] == ["dance.webp"]
    assert named["image partly transparent"] == ["logo.png"] and named["image in CMYK, whose col"] == ["print.jpg"]
    assert named["image of which a third o"] == ["wide.png"]
    warnings = [one["text"] for one in data["warnings"]]
    assert any("unsupported extensions" in text and text.endswith("scan.tiff") for text in warnings)
    assert sum("without a caption file" in text for text in warnings) == 1, "said once for both sizes"
    masked = config.read_text().replace("caption_extension", "alpha_mask = true\ncaption_extension")
    config.write_text(masked)
    assert "partly transparent" not in train(["--dataset_config", str(config), "--audit_only"]).stderr


def test_nothing_is_written_without_a_place_and_good_images_are_said_to_be(
    train: Train, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "inspect", lambda *samples, has_alpha: [])
    before = sorted(images.rglob("*"))
    done = train(["--train_data_dir", str(images), "--resolution", "64", "--caption_extension", ".txt", "--audit_only"])
    assert done.status == 0 and "no problems found in the images" in done.stderr
    assert sorted(images.rglob("*")) == before
