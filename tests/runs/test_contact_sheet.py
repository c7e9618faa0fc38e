"""Contact sheets compared with the previews of runs for the same weights, prompts and seeds."""

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library.training.offline.contact_sheet import GAP, LABEL_HEIGHT, LABEL_WIDTH, arrange
from library.training.report_page.writer import read_report
from tests.running import Finished, make_images
from tests.tiny.bases import BASES
from tools import contact_sheet

Train = Callable[..., Finished]
PROMPTS = "a red cat --w 64 --h 64 --s 2 --d 3 --n blue\na dog --w 64 --h 64 --s 2 --d 8\n"


def cells(sheet: Path, num_rows: int, num_columns: int) -> Any:
    """Return the pixels of the 64 x 64 images by row and column."""
    pixels, pitch = np.asarray(Image.open(sheet)).astype(int), 64 + GAP
    assert pixels.shape == (LABEL_HEIGHT + num_rows * pitch, LABEL_WIDTH + num_columns * pitch, 3)
    return [
        [
            pixels[LABEL_HEIGHT + row * pitch :, LABEL_WIDTH + column * pitch :][:64, :64]
            for column in range(num_columns)
        ]
        for row in range(num_rows)
    ]


def preview(folder: Path, event: str, index: int) -> Any:
    """Return the pixels of a run's preview, with transparency shown as white like on a sheet."""
    (path,) = (folder / "sample").glob(f"mine_{event}_{index:02}_*.png")
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB")).astype(int)


def without_options(words: list[str], *flags: str) -> list[str]:
    """Return a command line without these options and their values."""
    return [word for i, word in enumerate(words) if word not in flags and (i == 0 or words[i - 1] not in flags)]


OTHERS = [pytest.param(name, marks=pytest.mark.nightly) for name in BASES if name not in ("sd", "flux")]


@pytest.mark.parametrize("name", ["sd", "flux", *OTHERS])
def test_a_sheet_shows_the_previews_of_the_run(train: Train, tmp_path: Path, name: str) -> None:
    """Two files of one run and the base model appear in the order of their steps."""
    base = BASES[name]
    make_images(tmp_path / "data" / "1_thing", 2, seed=len(name))
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    model, out = base.build(tmp_path / "model"), tmp_path / "out"
    words = [
        *model, "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64",
        "--output_dir", str(out), "--output_name", "mine", "--network_module", base.module, "--network_dim", "4",
        "--learning_rate", "3e-2", "--max_train_steps", "4", "--save_every_n_steps", "2", "--seed", "5",
        "--max_data_loader_n_workers", "0", "--sample_prompts", str(tmp_path / "prompts.txt"),
        "--walk_seed",
    ]  # fmt: skip
    run = [*words, "--sample_every_n_steps", "2", "--sample_at_first", "--network_dropout", "0.1"]
    assert train(run, script=base.script).status == 0
    assert {path.stem.rpartition("_")[2] for path in (out / "sample").glob("mine_0*.png")} == {"3", "9"}
    assert contact_sheet.main(["--script", f"{base.script}.py", *words]) == 0
    rows = cells(out / "mine-sheet.png", 3, 2)  # the last file equals that of step 4 and is drawn once
    report = read_report(out / "mine-report.html")
    assert report.step == 4 and report.sheet is not None
    with Image.open(BytesIO(base64.b64decode(report.sheet.partition(",")[2]))) as sheet_image:
        assert sheet_image.size == Image.open(out / "mine-sheet.png").size
    for row, event in enumerate(("e000000", "000002", "000004")):
        for column in range(2):
            assert np.abs(rows[row][column] - preview(out, event, column)).max() <= 1
    assert np.abs(rows[0][0] - rows[1][0]).max() > 3 and np.abs(rows[1][0] - rows[2][0]).max() > 3


def test_strengths_side_by_side_match_a_preview_line_with_several_strengths(
    train: Train, base_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The strength applies to the text encoder's adapter too; both report the same rank correlation."""
    out, line, strengths = tmp_path / "out", "a red cat --w 64 --h 64 --s 2 --d 3", "-2,-1,0,1,2"
    (tmp_path / "strip.txt").write_text(f"{line} --am {strengths}\n")
    (tmp_path / "plain.txt").write_text(line)
    words = [*without_options(base_arguments, "--learning_rate"), "--learning_rate", "3e-2"]
    events = ["--log_events", str(tmp_path / "events.jsonl"), "--sample_every_n_steps", "4"]
    done = train([*words, *events, "--sample_prompts", str(tmp_path / "strip.txt")])
    assert done.status == 0, done.stderr
    lines = [json.loads(text) for text in (tmp_path / "events.jsonl").read_text().splitlines()]
    (measured,) = (event for event in lines if event["event"] == "strengths")
    assert measured["strengths"] == [-2.0, -1.0, 0.0, 1.0, 2.0] and measured["seed"] == 3
    assert measured["changes"][0] == 0.0 and measured["changes"][-1] == pytest.approx(1.0)
    assert f"a red cat: rank correlation of strength and change {measured['correlation']:.2f}" in done.stderr
    assert [event["strength"] for event in lines if event["event"] == "preview"] == measured["strengths"]

    sheet = ["--script", "train_network.py", f"--multipliers={strengths}", "--sample_prompts"]
    assert contact_sheet.main([*sheet, str(tmp_path / "plain.txt"), *words]) == 0
    (row,) = cells(out / "mine-sheet.png", 1, 5)
    for column, drawn in enumerate(row):
        assert np.abs(drawn - preview(out, "000004", column)).max() <= 1
    assert np.abs(row[0] - row[1]).max() > 3 and np.abs(row[3] - row[4]).max() > 3
    log = capfd.readouterr().err
    assert f"mine: rank correlation of strength and change {measured['correlation']:.2f} on average" in log

    assert contact_sheet.main([*sheet, str(tmp_path / "strip.txt"), *words]) == 1
    log = capfd.readouterr().err
    assert "strip.txt, line 1: remove strength (--am); --multipliers sets the strengths of all prompts" in log


def test_files_and_seeds_can_be_chosen(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    """Each seed of a prompt is a column, and the order of the files does not change the images."""
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 3\n")
    words = [*base_arguments, "--sample_prompts", str(tmp_path / "prompts.txt"), "--learning_rate", "1e-1"]
    paths = []
    for dim, module in (("2", "networks.loha"), ("4", "networks.lora")):
        kind = ["--network_dim", dim, "--network_module", module, "--output_name", module[9:]]
        assert train([*words, *kind]).status == 0
        paths.append(str(tmp_path / "out" / f"{module[9:]}.safetensors"))
    sheets = []
    for number, files in enumerate((paths, paths[::-1])):
        sheet = tmp_path / f"{number}.png"
        chosen = ["--files", *files, "--seeds", "3", "4", "--sheet", str(sheet)]
        assert (
            contact_sheet.main(["--script", "train_network.py", *chosen, *without_options(words, "--output_dir")]) == 0
        )
        sheets.append(cells(sheet, 3, 2))
    for column in range(2):
        assert (sheets[0][1][column] == sheets[1][2][column]).all() and (
            sheets[0][2][column] == sheets[1][1][column]
        ).all()
        assert (sheets[0][0][column] == sheets[1][0][column]).all()
        assert np.abs(sheets[0][1][column] - sheets[0][2][column]).max() > 3
    assert np.abs(sheets[0][0][0] - sheets[0][0][1]).max() > 3


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--script", "nothing.py"], "is not a training script"),
        (["--script", "train_network.py"], "--sample_prompts contains no prompts"),
        (["--script", "train_network.py", "--sample_prompts", "x.txt"], "or --output_dir to search for them"),
        (
            ["--script", "train_network.py", "--sample_prompts", "x.txt", "--output_dir", "."],
            "contains no adapter files",
        ),
        (["--script", "train_network.py", "--sample_prompts", "x.txt", "--files", "no.pt"], "no.pt does not exist"),
        (["--script", "train_network.py", "--side", "0"], "--side is 0"),
    ],
)
def test_missing_inputs_are_named(
    words: list[str], wanted: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert contact_sheet.main(words) == 1
    assert wanted in capsys.readouterr().err


def test_long_labels_are_truncated_and_large_images_are_scaled_down() -> None:
    images = [[Image.new("RGB", size, (200, 0, 0)) for size in ((512, 256), (64, 64))] for _ in range(2)]
    sheet = arrange(images, ["a" * 500, "b\nc"], ["a cat " * 90, "猫"], side=128)
    assert sheet.size == (LABEL_WIDTH + 2 * (128 + GAP), LABEL_HEIGHT + 2 * (64 + GAP))
    pixels = np.asarray(sheet)
    assert (pixels[LABEL_HEIGHT, LABEL_WIDTH] == (200, 0, 0)).all()
    assert (pixels[LABEL_HEIGHT:, LABEL_WIDTH - GAP : LABEL_WIDTH] == 255).all()  # no label overlaps an image
