"""Scores of previews in a run, its report, the comparison of its files, and a contact sheet."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image

from library.data.plan.audit_pixels import measure_sharpness
from library.training.evaluation.image_scores import AGREEMENT, NEAR_COPIES, SHARPNESS, SIMILARITY
from library.training.report_page.writer import read_report
from tests.running import Finished, load_saved
from tests.runs.test_events import SCHEMA, events_of, of_kind
from tests.tiny.score_models import write_clip, write_dinov2
from tools import choose_checkpoint, contact_sheet

Train = Callable[..., Finished]
PROMPTS = "a red cat --w 64 --h 64 --s 2 --d 3\na dog --w 64 --h 64 --s 2 --d 8\na dog --w 64 --h 64 --s 2 --am 0.5\n"


def sharpness_of(folder: Path, event: str) -> list[float]:
    paths = sorted((folder / "sample").glob(f"mine_{event}_0[01]_*.png"))
    return [measure_sharpness(np.asarray(Image.open(path).convert("RGB").convert("L"))) for path in paths]


def test_previews_are_scored_in_the_report_and_beside_the_losses_of_the_files(
    train: Train, base_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Scoring changes no bit of the adapter; the file's scores are those of the run's previews at its step."""
    words = [word for word in base_arguments if word != "--no_report"]
    (tmp_path / "prompts.txt").write_text(PROMPTS)
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

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS.splitlines()[:2]))
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
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    missing = str(tmp_path / "dino")
    words = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first", "--score_previews"]
    run = train([*base_arguments, *words, "--score_models", missing])
    assert run.status == 1 and f"--score_models {missing} does not exist" in run.stdout + run.stderr
    assert run.losses == []
