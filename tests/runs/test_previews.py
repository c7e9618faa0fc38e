"""Previews during training, their contact sheets and scores; none affects training."""

import base64
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from safetensors.torch import load_file

from library.data.plan.audit_pixels import measure_sharpness
from library.training.evaluation import preview
from library.training.evaluation.drawing import draw_latents
from library.training.evaluation.image_scores import AGREEMENT, NEAR_COPIES, SHARPNESS, SIMILARITY
from library.training.offline.contact_sheet import GAP, LABEL_HEIGHT, LABEL_WIDTH, arrange
from library.training.report_page.writer import read_report
from tests.running import Finished, launch_command, load_saved, make_images
from tests.runs.test_report import SCHEMA, events_of, of_kind
from tests.tiny.bases import BASES
from tests.tiny.score_models import write_clip, write_dinov2
from tools import choose_checkpoint, contact_sheet

Train = Callable[..., Finished]
PROMPTS = """# two images
a (red:1.3) cat --w 64 --h 64 --d 3 --s 3 --l 4 --n dog
a dog --w 64 --h 72 --s 3 --l 1 --ss euler_a
"""
EVENTS = ["--sample_at_first", "--sample_every_n_steps", "2"]


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Write a file of two prompts and return the option for it."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return ["--sample_prompts", str(tmp_path / "prompts.txt")]


def images(tmp_path: Path) -> dict[str, Path]:
    """Return the files of the sample folder by name without the time."""
    return {re.sub(r"_\d{14}", "", path.name): path for path in sorted((tmp_path / "out" / "sample").glob("*.png"))}


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_previews_follow_the_training(
    train: Train, base_arguments: list[str], prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "is_read_by_person", lambda: False)
    done = train([*base_arguments, *prompts, *EVENTS, "--learning_rate", "0.05"]).ok()
    previews = images(tmp_path)
    events = ["000002", "000004", "e000000"]
    assert list(previews) == [f"mine_{event}_{end}.png" for event in events for end in ("00_3", "01")]
    assert pixels(previews["mine_000004_01.png"]).shape == (72, 64, 3)
    first, second, last = (pixels(previews[f"mine_{event}_00_3.png"]) for event in ("e000000", "000002", "000004"))
    assert np.abs(first - second).max() > 0 and np.abs(second - last).max() > 0
    grids = sorted(path.name for path in (tmp_path / "out" / "sample_grid").iterdir())
    assert [re.sub(r"_\d{14}", "", name) for name in grids] == [f"mine_{event}.png" for event in events]
    # fluxgym shows all files in this folder, but nothing if it contains a folder.
    assert all(path.is_file() for path in (tmp_path / "out" / "sample").iterdir())
    assert "generating sample images at step / サンプル画像生成 ステップ: 2" in done.stdout


def test_preview_epochs_take_precedence_over_steps(
    train: Train, base_arguments: list[str], prompts: list[str], tmp_path: Path
) -> None:
    train(
        [
            *base_arguments,
            *prompts,
            "--max_train_epochs",
            "2",
            "--sample_every_n_epochs",
            "2",
            *EVENTS[1:],
            "--cache_latents",
        ]
    ).ok()
    assert list(images(tmp_path)) == ["mine_e000002_00_3.png", "mine_e000002_01.png"]


@pytest.mark.parametrize(
    "options",
    [
        ["--network_dropout", "0.3", "--network_args", "rank_dropout=0.2", "module_dropout=0.2"],
        pytest.param(
            ["--network_module", "networks.dylora", "--network_args", "unit=2", "--text_encoder_lr", "0"],
            marks=pytest.mark.nightly,
        ),
        ["--optimizer_type", "AdamWScheduleFree", "--gradient_checkpointing"],
        pytest.param(
            ["--network_module", "lycoris.kohya", "--network_args", "algo=loha", "preset=attn-mlp", "rank_dropout=0.3"],
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["dropout", "dylora", "schedule_free", "lycoris"],
)
def test_previews_do_not_change_training(
    train: Train, base_arguments: list[str], prompts: list[str], tmp_path: Path, options: list[str]
) -> None:
    """Compare the adapter bit for bit."""
    drawing = train([*base_arguments, *options, *prompts, *EVENTS, "--output_name", "drawing"])
    plain = train([*base_arguments, *options, "--output_name", "plain"])
    assert drawing.status == 0 and len(images(tmp_path)) == 6, drawing.stderr
    assert drawing.losses == plain.losses
    a, b = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("drawing", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in b) and a.keys() == b.keys()


@pytest.mark.parametrize(
    "options",
    [
        ["--network_dropout", "0.5", "--network_args", "rank_dropout=0.5", "module_dropout=0.5"],
        ["--network_module", "networks.dylora", "--network_args", "unit=1"],
        ["--optimizer_type", "AdamWScheduleFree"],
    ],
    ids=["dropout", "dylora", "schedule_free"],
)
def test_a_preview_matches_diffusers_with_the_saved_file(
    train: Train, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path, options: list[str]
) -> None:
    """Previews use no dropout, all ranks and averaged weights; the image before training differs."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    (tmp_path / "prompts.json").write_text(
        '[{"prompt": "a red cat", "negative_prompt": "dog", "width": 64, "height": 64, "seed": 3, "sample_steps": 5}]'
    )
    previews = ["--sample_prompts", str(tmp_path / "prompts.json"), "--sample_at_first", "--sample_every_n_steps", "4"]
    train([*base_arguments, *options, *previews, "--learning_rate", "0.05"]).ok()
    pipeline = StableDiffusionPipeline.from_pretrained(
        str(tiny_sd_folder), safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(load_file(tmp_path / "out" / "mine.safetensors"))
    image = pipeline(
        "a red cat", negative_prompt="dog", width=64, height=64, num_inference_steps=5, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    images_by_name = images(tmp_path)
    assert np.abs(pixels(images_by_name["mine_000004_00_3.png"]) - np.asarray(image).astype(int)).max() <= 2
    assert np.abs(pixels(images_by_name["mine_e000000_00_3.png"]) - np.asarray(image).astype(int)).max() > 10


def test_a_failed_preview_does_not_end_the_run(
    train: Train, base_arguments: list[str], prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file blocks the path of the preview folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample").write_text("in the way")
    done = train([*base_arguments, *prompts, *EVENTS])
    assert done.status == 0
    assert "preview 0 (a (red:1.3) cat) failed, training continues: FileExistsError" in done.stderr
    assert (tmp_path / "out" / "mine.safetensors").exists()


def test_previews_are_logged_to_tensorboard(
    train: Train, base_arguments: list[str], prompts: list[str], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train([*base_arguments, *prompts, *EVENTS, "--logging_dir", str(tmp_path / "logs")]).ok()
    (folder,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder / "network_train")).Reload()
    assert events.Tags()["images"] == ["sample_0", "sample_1"]
    assert [(event.step, event.width, event.height) for event in events.Images("sample_1")] == [
        (0, 64, 72),
        (2, 64, 72),
        (4, 64, 72),
    ]


@pytest.mark.parametrize("cut", [1, 4, 6], ids=["before_training", "after_step_2", "after_the_last_step"])
def test_previews_that_a_signal_cuts_off_are_drawn_by_the_next_run(
    train: Train,
    base_arguments: list[str],
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: int,
) -> None:
    """Two images each are due before the first step and after steps 2 and 4; the signal comes with the `cut`-th."""
    words = [*base_arguments, *prompts, *EVENTS, "--autoresume", "--network_dropout", "0.3"]
    assert train([*words, "--output_dir", str(tmp_path / "whole")]).status == 0
    num_drawn = 0

    def draw(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_drawn
        num_drawn += 1
        if num_drawn == cut:
            os.kill(os.getpid(), signal.SIGINT)
        return draw_latents(*arguments, **keywords)

    monkeypatch.setattr("library.training.evaluation.preview.draw_latents", draw)
    assert train(words).status == 0 and len(images(tmp_path)) < cut
    assert train(words).status == 0
    whole = tmp_path / "whole" / "sample"
    assert [*images(tmp_path)] == sorted(re.sub(r"_\d{14}", "", path.name) for path in whole.iterdir())
    a, b = (load_file(tmp_path / name / "mine.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert "nothing is left to train" in train(words).stderr


@pytest.mark.nightly
def test_with_two_processes_one_draws_and_training_is_unchanged(
    base_arguments: list[str], prompts: list[str], tmp_path: Path
) -> None:
    command = launch_command("train_network.py")
    command[command.index("--num_processes") + 1] = "2"
    for name, previews in (("drawing", [*prompts, *EVENTS]), ("plain", [])):
        arguments = [*base_arguments, "--max_train_steps", "2", "--network_dropout", "0.3", "--output_name", name]
        launched = [*command[:3], "--cpu", *command[3:]]
        done = subprocess.run([*launched, *arguments, *previews], capture_output=True, timeout=300, cwd="/")
        assert done.returncode == 0, done.stderr.decode()
    assert [name.removeprefix("drawing_") for name in images(tmp_path)] == [
        "000002_00_3.png",
        "000002_01.png",
        "e000000_00_3.png",
        "e000000_01.png",
    ]
    a, b = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("drawing", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in b)


# Contact sheets compared with the previews of runs for the same weights, prompts and seeds.

SHEET_PROMPTS = "a red cat --w 64 --h 64 --s 2 --d 3 --n blue\na dog --w 64 --h 64 --s 2 --d 8\n"


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


def pixels_of_preview(folder: Path, event: str, index: int) -> Any:
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
    (tmp_path / "prompts.txt").write_text(SHEET_PROMPTS)
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
            assert np.abs(rows[row][column] - pixels_of_preview(out, event, column)).max() <= 1
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
    done = train([*words, *events, "--sample_prompts", str(tmp_path / "strip.txt")]).ok()
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
        assert np.abs(drawn - pixels_of_preview(out, "000004", column)).max() <= 1
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


# Scores of previews in a run, its report, the comparison of its files, and a contact sheet.

SCORED_PROMPTS = (
    "a red cat --w 64 --h 64 --s 2 --d 3\na dog --w 64 --h 64 --s 2 --d 8\na dog --w 64 --h 64 --s 2 --am 0.5\n"
)


def sharpness_of(folder: Path, event: str) -> list[float]:
    paths = sorted((folder / "sample").glob(f"mine_{event}_0[01]_*.png"))
    return [measure_sharpness(np.asarray(Image.open(path).convert("RGB").convert("L"))) for path in paths]


def test_previews_are_scored_in_the_report_and_beside_the_losses_of_the_files(
    train: Train, base_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Scoring changes no bit of the adapter; the file's scores are those of the run's previews at its step."""
    words = [word for word in base_arguments if word != "--no_report"]
    (tmp_path / "prompts.txt").write_text(SCORED_PROMPTS)
    words += ["--max_train_steps", "4", "--save_every_n_steps", "2", "--validation_split", "0.5", "--seed", "11"]
    words += ["--learning_rate", "3e-2", "--sample_prompts", str(tmp_path / "prompts.txt")]
    models = [str(write_dinov2(tmp_path / "dino")), str(write_clip(tmp_path / "clip"))]
    scoring = ["--score_previews", "--score_models", *models]
    drawing = ["--sample_every_n_steps", "2", "--sample_at_first"]
    assert train([*words, *drawing]).status == 0
    unscored, folder = load_saved(tmp_path), tmp_path / "out"
    assert read_report(folder / "mine-report.html").scores.items == []
    for path in (folder / "sample").iterdir():
        path.unlink()

    run = train([*words, *drawing, *scoring, "--log_events", str(tmp_path / "events.jsonl")])
    assert run.status == 0, run.stdout
    scored = load_saved(tmp_path)
    assert all(torch.equal(scored[name], tensor) for name, tensor in unscored.items())
    lines = events_of(tmp_path / "events.jsonl")
    for line in lines:
        Draft202012Validator(SCHEMA).validate(line)
    events = {line["step"]: line["scores"] for line in of_kind(lines, "scores")}
    assert list(events) == [0, 2, 4]
    for step, event in ((0, "e000000"), (2, "000002"), (4, "000004")):
        assert set(events[step]) == {SHARPNESS, NEAR_COPIES, SIMILARITY, AGREEMENT}
        # The third prompt draws at half the strength, which no file has.
        assert events[step][SHARPNESS] == pytest.approx(sharpness_of(folder, event))
        assert f"previews of step {step}: {SHARPNESS} {fmean(events[step][SHARPNESS]):.3g}, " in run.stdout + run.stderr
    items = read_report(folder / "mine-report.html").scores.items
    assert [item["step"] for item in items] == [0, 2, 4]
    for item in items:
        means = {name: values["mean"] for name, values in item["scores"].items()}
        assert means == pytest.approx({name: fmean(values) for name, values in events[item["step"]].items()})

    (tmp_path / "prompts.txt").write_text("\n".join(SCORED_PROMPTS.splitlines()[:2]))
    capfd.readouterr()
    assert choose_checkpoint.main(["--script", "train_network.py", *words, *scoring]) == 0
    table = capfd.readouterr().out
    choice = read_report(folder / "mine-report.html").choice
    assert choice is not None and [candidate["step"] for candidate in choice["candidates"]] == [0, 2, 4]
    for candidate in choice["candidates"]:
        for name, score in candidate["scores"].items():
            # The tool draws and decodes without the run's other work in memory: a pixel may differ by one.
            assert score["mean"] == pytest.approx(fmean(events[candidate["step"]][name]), rel=0.02, abs=1e-3)
    assert "scores of 2 images, and differences from the file with the lowest loss:" in table
    assert re.search(
        rf"mine-step00000002\.safetensors +{choice['candidates'][1]['scores'][SHARPNESS]['mean']:.4g}", table
    )

    assert contact_sheet.main(["--script", "train_network.py", *words, "--score_previews"]) == 0
    printed = capfd.readouterr()
    shown = re.findall(r"(without an adapter|mine\S*): sharpness (\S+), near-copies", printed.out + printed.err)
    assert [name for name, _ in shown] == ["without an adapter", "mine-step00000002", "mine-step00000004"]
    means = [candidate["scores"][SHARPNESS]["mean"] for candidate in choice["candidates"]]
    assert [float(value) for _, value in shown] == pytest.approx(means, rel=0.01)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--score_previews"], "--score_previews needs prompts to draw: set --sample_prompts"),
        (["--seeds", "1", "2"], "--seeds has no effect without --score_previews"),
        (["--score_models", "dino"], "--score_models has no effect without --score_previews"),
    ],
)
def test_a_comparison_that_cannot_score_says_what_to_add(
    train: Train, base_arguments: list[str], capfd: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    assert train([*base_arguments, "--max_train_steps", "1", "--seed", "1"]).status == 0
    capfd.readouterr()
    arguments = ["--script", "train_network.py", *base_arguments, *words]
    assert choose_checkpoint.main(arguments) == 1 and error in capfd.readouterr().err


def test_a_missing_model_ends_the_run_before_anything_is_trained(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text(SCORED_PROMPTS)
    missing = str(tmp_path / "dino")
    words = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first", "--score_previews"]
    run = train([*base_arguments, *words, "--score_models", missing])
    assert run.status == 1 and f"--score_models {missing} does not exist" in run.stdout + run.stderr
    assert run.losses == []
