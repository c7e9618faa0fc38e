"""--audit_only inspects every image without loading a base model."""

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
def test_findings_are_logged_and_shown_in_the_report(
    train: Train, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script in SCRIPTS
    folder = make_images(tmp_path / "data" / "1_<b>thing", 4, side=96, seed=12)
    Image.new("RGB", (96, 96), (9, 90, 9)).save(folder / "green.png")
    with Image.open(folder / "01.png") as image:
        image.resize((80, 80)).save(folder / "copy.jpg", quality=60)
    logged: list[Event] = []
    monkeypatch.setattr(
        module, "collect_events", lambda events, make=module.collect_events: logged.extend(events) or make(events)
    )
    arguments = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--caption_extension", ".txt"]
    done = train([*arguments, "--audit_only", "--output_dir", str(tmp_path / "out"), "--output_name", "cat"], script)
    assert done.status == 0, done.stderr
    assert "1 image of a single colour" in done.stderr
    assert "2 images near-duplicated" in done.stderr and "copy.jpg (group 1)" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat-audit.html"]
    page = (tmp_path / "out" / "cat-audit.html").read_text(encoding="utf-8")
    findings = read_data(page)["findings"]
    assert [finding["num_pictures"] for finding in findings][:2] == [1, 2]
    assert all(
        p["thumbnail"].startswith("data:image/webp;base64,") for finding in findings for p in finding["pictures"]
    )
    schema = Draft202012Validator(json.loads((ROOT / "docs" / "events.schema.json").read_text(encoding="utf-8")))
    for event in logged:
        schema.validate(json.loads(json.dumps(module.plain(event.as_line(1.0)))))


def test_file_formats_crops_and_all_warnings_are_on_the_page(train: Train, tmp_path: Path) -> None:
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
    findings = {finding["text"].partition(" ")[2][:24]: finding["pictures"] for finding in data["findings"]}
    file_names = {text: [Path(image["file"]).name for image in images] for text, images in findings.items()}
    assert file_names["image animated; only the"] == ["dance.webp"]
    assert file_names["image partly transparent"] == ["logo.png"] and file_names["image in CMYK, whose col"] == [
        "print.jpg"
    ]
    assert file_names["image of which a third o"] == ["wide.png"]
    warnings = [finding["text"] for finding in data["warnings"]]
    assert any("unsupported extensions" in text and text.endswith("scan.tiff") for text in warnings)
    assert sum("without a caption file" in text for text in warnings) == 1, "said once for both sizes"
    masked = config.read_text().replace("caption_extension", "alpha_mask = true\ncaption_extension")
    config.write_text(masked)
    assert "partly transparent" not in train(["--dataset_config", str(config), "--audit_only"]).stderr


def test_nothing_is_written_without_an_output_path_and_good_images_are_reported_as_fine(
    train: Train, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "inspect", lambda *samples, has_alpha: [])
    before = sorted(images.rglob("*"))
    done = train(["--train_data_dir", str(images), "--resolution", "64", "--caption_extension", ".txt", "--audit_only"])
    assert done.status == 0 and "no problems found in the images" in done.stderr
    assert sorted(images.rglob("*")) == before


def test_options_that_a_dataset_file_overrides_are_warned_of(train: Train, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 2)
    file = tmp_path / "data.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n"
    )
    done = train(
        ["--dataset_config", str(file), "--resolution", "128", "--train_batch_size", "2", "--audit_only"],
        "train_network",
    )
    assert done.status == 0, done.stderr
    assert f"--resolution 128 has no effect: {file} sets resolution = 64; change it there" in done.stderr
    assert f"--train_batch_size 2 has no effect: {file} sets batch_size = 4; change it there" in done.stderr


def test_an_option_typed_with_its_default_is_warned_of_too(train: Train, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 2)
    text = "[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\n"
    (tmp_path / "data.toml").write_text(f"{text}image_dir = '{images.as_posix()}'\n")
    words = ["--dataset_config", str(tmp_path / "data.toml"), "--audit_only"]
    line = f"--train_batch_size 1 has no effect: {tmp_path / 'data.toml'} sets batch_size = 4; change it there"
    for typed in (["--train_batch_size", "1"], ["--train_batch_size=1"]):
        assert train([*words, *typed], "train_network").stderr.count(line) == 1
    assert "has no effect" not in train(words, "train_network").stderr
    (tmp_path / "data.toml").write_text("datasets = 3")
    assert "must be an array of tables" in train([*words, "--train_batch_size", "1"], "train_network").stderr
