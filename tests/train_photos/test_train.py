"""train.py on folders as people have them, with tiny bases of every family and a pipeline without one."""

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import train
from library.base.errors import UserError
from library.train_photos.screen import LogFile, Screen, logging_to
from library.training.failures import interruption
from library.training.planning.run_duration import RunDuration
from library.training.report_page.writer import read_report
from tests.running import Finished, make_images
from tests.tiny.bases import BASES
from tests.tiny.pipelines import build_tiny_pipeline

GENERIC = "PixArtSigmaPipeline"


def draw_photo(number: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((96, 64))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def write_turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(3):
        draw_photo(number).save(folder / f"IMG_{number}.JPG", exif=exif)


def write_heic(folder: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    for number in range(3):
        pillow_heif.from_pillow(draw_photo(number)).save(folder / f"IMG_{number}.HEIC")


def write_alpha(folder: Path) -> None:
    for number in range(3):
        draw_photo(number, "RGBA").save(folder / f"cut_{number}.png")


def write_damaged(folder: Path) -> None:
    write_turned(folder)
    whole = (folder / "IMG_0.JPG").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])


def write_nested(folder: Path) -> None:
    """Two folders, one with sd-scripts' repeats, and captions beside some photos."""
    for name in ("3_mycat cat", "庭の 猫"):
        make_images(folder / name, 2)
    (folder / "庭の 猫" / "00.png").rename(folder / "庭の 猫" / "写真 1.png")


KINDS: dict[str, Callable[[Path], None]] = {
    "turned": write_turned, "heic": write_heic, "alpha": write_alpha, "damaged": write_damaged, "nested": write_nested,
}  # fmt: skip


def build_base(name: str, folder: Path) -> str:
    """Write a tiny base, and return what --base takes."""
    if name == GENERIC:
        build_tiny_pipeline(GENERIC).save_pretrained(folder)
        return str(folder)
    arguments = BASES[name].build(folder)
    return arguments[arguments.index("--pretrained_model_name_or_path") + 1]


NAMES = ("qwen_image_21", "flux", "sd3", "lumina", "zimage", GENERIC)  # quick ones, with every kind of folder
OTHERS = sorted({*BASES}.difference(NAMES))
CASES = [(name, [*KINDS][number % len(KINDS)]) for number, name in enumerate((*NAMES, *OTHERS))]


@pytest.mark.parametrize(
    ("base", "kind"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] in NAMES else pytest.mark.nightly) for case in CASES],
)
def test_a_folder_of_photos_becomes_an_adapter_that_draws(
    base: str, kind: str, tmp_path: Path, fresh_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "写真 of a cat"
    photos.mkdir()
    KINDS[kind](photos)
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    status = train.main([
        str(photos), "--base", build_base(base, tmp_path / "base"), "--trigger", "mycat, a cat", "--steps", "2",
        "--prediction", "epsilon", "--output_dir", str(out), "--name", "mine", "--yes",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert load_file(out / "mine.safetensors")
    assert (out / "mine-strengths" / "strengths.png").is_file()  # drawn by tools/draw.py
    assert (out / "mine-strengths" / "files.png").is_file()
    assert len(list((out / "sample").glob("*.png"))) == 6  # three prompts before the first step and after the last
    record = read_report(out / "mine-report.html")
    assert record.notes["Plan"][0].startswith("base") and any(
        line.startswith("It took") for line in record.notes["Use it"]
    )
    # Two folders of `nested` hold the same two photos.
    assert len(record.photos) >= 2 and len(record.sheets) == 2 and record.previews.items[-1]["step"] == 2
    assert printed.splitlines()[-1] == f"All else is in {out / 'mine.log'}"
    assert "import network module" not in printed and "import network module" in (out / "mine.log").read_text()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert ("broken.jpg, cannot be read" in printed) == (kind == "damaged")
    assert "photos    " in printed and f"Use {out / 'mine.safetensors'}" in printed


@pytest.mark.slow
def test_the_script_trains_the_same_from_the_file_that_is_written(
    tmp_path: Path, fresh_process: None, request: pytest.FixtureRequest
) -> None:
    run_script: Callable[..., Finished] = request.getfixturevalue("train")
    write_turned(tmp_path)
    base, out = build_base("sd3", tmp_path / ".base"), tmp_path / "out"
    words = [str(tmp_path), "--base", base, "--steps", "2", "--output_dir", str(out), "--name", "mine", "--yes"]
    assert train.main(words) == 0
    config = (out / "mine.toml").read_text()
    assert "fit" not in config and "mine-dataset.toml" in config
    again = ["--config_file", str(out / "mine.toml"), "--output_dir", str(tmp_path / "again")]
    assert run_script(again, "sd3_train_network").status == 0
    first, second = (load_file(folder / "mine.safetensors") for folder in (out, tmp_path / "again"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    before = (out / "mine.safetensors").read_bytes()
    assert train.main(words) == 0  # a finished run stays
    assert (out / "mine.safetensors").read_bytes() == before and (out / "mine-2.safetensors").exists()
    (out / "mine.toml").write_text("my = 'own'")
    assert train.main(words) == 1
    assert (out / "mine.toml").read_text() == "my = 'own'"


@pytest.mark.slow
def test_class_images_are_in_the_plan_and_drawn_before_the_training(
    tmp_path: Path, fresh_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    write_turned(tmp_path / "photos")
    out = tmp_path / "out"
    words = [
        str(tmp_path / "photos"), "--base", build_base("sd", tmp_path / "base"), "--prediction", "epsilon", "--steps",
        "2", "--output_dir", str(out), "--name", "mine", "--yes", "--class_images", "3",
    ]  # fmt: skip
    assert train.main([*words, "--trigger", "mycat"]) == 1
    assert "--class_images needs what the photos show" in capsys.readouterr().err and not out.exists()
    assert train.main([*words, "--trigger", "mycat, a cat"]) == 0
    printed = capsys.readouterr().out
    assert "class     3 images of 'a cat', which the base draws first" in printed
    assert len(list((out / "cache").glob("a_cat-*/0000?.png"))) == 3
    assert 'prompt = "a cat"' in (out / "mine-dataset.toml").read_text()
    assert "3 regularisation images are drawn" in (out / "mine.log").read_text()


# What train.py shows while it trains, and what goes to its log file.

PLANNED = RunDuration(loading=5, caching=10, step=1.0, num_steps=100, previews=20, validation=0, saving=0, sheets=30)


def list_events(seconds_per_step: float) -> list[dict[str, Any]]:
    """Return the events of 100 steps with a file and previews of three prompts every 25."""
    events: list[dict[str, Any]] = [{"event": "plan", "max_train_steps": 100, "first_step": 0}]
    for step in range(101):
        if step:
            events.append({"event": "step", "step": step, "time": 1000 + seconds_per_step * step})
        if step % 25 == 0:
            if step:
                events.append(
                    {"event": "saved", "kind": "weights", "reason": "step", "step": step, "file": f"{step}.st"}
                )
                events.append({"event": "saved", "kind": "state", "reason": "step", "step": step, "file": f"{step}"})
            events += [
                {"event": "preview", "step": step, "prompt": f"prompt {index}", "file": f"{step}_{index}.png"}
                for index in range(3)
            ]
    return [*events, {"event": "saved", "kind": "weights", "reason": "end", "step": 100, "file": "mine.safetensors"}]


def test_a_run_of_100_steps_has_ten_lines_with_its_bar() -> None:
    stream = io.StringIO()
    with Screen(stream, PLANNED) as screen:
        screen.take(list_events(0.5))
        screen.close()
        screen.show_stage("drawing")
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert lines[0] == "preview   step 0: prompt 0: 0_0.png" and lines[-1] == "file      step 100: mine.safetensors"
    assert len(lines) == 9 and sum(line.startswith("preview") for line in lines) == 5


def test_after_20_steps_the_bar_counts_on_with_the_measured_time() -> None:
    stream = io.StringIO()
    with Screen(stream, PLANNED) as screen:
        events = list_events(2.0)
        screen.take([event for event in events if event.get("step", 0) <= 20])
        assert screen.seconds_left == pytest.approx(0.8 * (100 + 20) + 30)
        screen.take([event for event in events if 20 < event.get("step", 0) <= 25])
        assert screen.seconds_left == pytest.approx(0.75 * (200 + 20) + 30)


def test_planned_parts_sum_up() -> None:
    assert PLANNED.seconds == 5 + 10 + 100 + 20 + 30
    assert max(PLANNED.parts, key=lambda name: PLANNED.parts[name]) == "training"


def test_output_goes_to_the_log_and_errors_to_the_terminal_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, path = logging.getLogger("a module"), tmp_path / "mine.log"
    before = logging.getLogger().handlers[:]
    for number in range(2):  # a run that goes on appends
        with logging_to(path):
            print(f"plain text {number}")
            sys.stderr.write("\r50 %")
            sys.stderr.write("\n")
            logger.warning("unseen")
            logger.error("wrong \x1b[31m")
            logging.getLogger(interruption.__name__).warning("SIGINT received")
    assert logging.getLogger().handlers == before
    assert path.read_text() == "plain text 0\nplain text 1\n"
    shown = capsys.readouterr()
    assert shown.out == "" and "unseen" not in shown.err and "50 %" not in shown.err
    assert "ERROR: wrong \\x1b[31m" in shown.err and "SIGINT received" in shown.err


def test_a_file_that_is_no_log_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.log").write_bytes(b"\0\1")
    with pytest.raises(UserError, match="the log of this run"):
        LogFile.open(tmp_path / "mine.log")
