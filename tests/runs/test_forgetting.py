"""Subsets with is_forgetting_probe are never trained on, measured like validation, and shown in report and tool."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.training.report_page.writer import read_report
from tests.running import Finished, make_images
from tests.runs.test_exit_status import stop_in_step  # noqa: F401
from tests.runs.test_report import events_of, of_kind
from tools import choose_checkpoint

Run = Callable[..., Finished]

DATASET = """
[general]
resolution = 64
caption_extension = ".txt"
batch_size = 2

[[datasets]]
[[datasets.subsets]]
image_dir = "{folder}/trained"
"""
ASIDE = """
[[datasets.subsets]]
image_dir = "{folder}/other"
num_repeats = 3
{key}
"""


@pytest.fixture
def words(tiny_sd_folder: Path, tmp_path: Path) -> list[str]:
    make_images(tmp_path / "trained", 6, seed=4)
    make_images(tmp_path / "other", 4, seed=5)
    return [
        "--pretrained_model_name_or_path", str(tiny_sd_folder), "--output_name", "mine", "--network_module",
        "networks.lora", "--network_dim", "4", "--learning_rate", "3e-2", "--max_train_steps", "4", "--seed", "5",
        "--save_every_n_steps", "2", "--max_data_loader_n_workers", "0", "--validate_at_first",
        "--validate_every_n_steps", "2",
    ]  # fmt: skip


@pytest.fixture
def run(train: Run, words: list[str], tmp_path: Path) -> Run:
    """Return `run(folder, key, ...)`, which trains with extra images marked by a key, or without them if it is None."""

    def start(folder: str, key: str | None, *more: str, status: int = 0) -> Finished:
        text = DATASET + ("" if key is None else ASIDE)
        (tmp_path / f"{folder}.toml").write_text(text.replace("{folder}", str(tmp_path)).replace("{key}", key or ""))
        places = ["--dataset_config", str(tmp_path / f"{folder}.toml"), "--output_dir", str(tmp_path / folder)]
        done = train([*words, *places, "--log_events", str(tmp_path / f"{folder}.jsonl"), *more])
        assert done.status == status, done.stderr
        return done

    return start


PROBE = "is_forgetting_probe = true"


def test_a_probe_is_never_trained_on_and_its_loss_equals_a_validation_loss(
    run: Run, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The weights equal those of a run without these images; the losses equal those of a run that holds them out."""
    probed = run("probed", PROBE)
    run("without", None)
    run("validated", "validation_split = 1.0")
    actual, other = (load_state_dict(tmp_path / name / "mine.safetensors") for name in ("probed", "without"))
    assert actual.keys() == other.keys() and all(torch.equal(actual[key], other[key]) for key in actual)
    events = of_kind(events_of(tmp_path / "probed.jsonl"), "forgetting")
    expected = of_kind(events_of(tmp_path / "validated.jsonl"), "validation")
    assert [actual["step"] for actual in events] == [0, 2, 4]
    for names in ("loss", "error", "num_pictures", "compared"):
        assert [actual[names] for actual in events] == [actual[names] for actual in expected], names
    assert events[0]["num_pictures"] == 4 and events[-1]["compared"]["to_step"] == 0
    assert not of_kind(events_of(tmp_path / "probed.jsonl"), "validation")
    assert "4 of 4 images are a forgetting probe, not trained" in probed.stderr
    assert "forgetting probe after step 4: loss" in probed.stderr and "has no effect" not in probed.stderr
    report_items = read_report(tmp_path / "probed" / "mine-report.html").forgetting.items
    assert [item["loss"] for item in report_items] == [actual["loss"] for actual in events]

    tool = ["--script", "train_network.py", *words, "--dataset_config", str(tmp_path / "probed.toml")]
    assert choose_checkpoint.main([*tool, "--output_dir", str(tmp_path / "probed")]) == 0
    table = capfd.readouterr().out
    assert "forgetting" in table.splitlines()[0]
    assert f"{events[-1]['compared']['mean']:.5f} (" in table


def test_a_resumed_run_compares_with_the_start_of_the_original_run(run: Run, tmp_path: Path) -> None:
    run("whole", PROBE, "--save_state")
    run("rest", PROBE, "--resume", str(tmp_path / "whole" / "mine-step00000002-state"))
    uninterrupted, rest = (of_kind(events_of(tmp_path / f"{name}.jsonl"), "forgetting") for name in ("whole", "rest"))
    assert [{k: event[k] for k in ("step", "loss", "compared")} for event in rest] == [
        {k: event[k] for k in ("step", "loss", "compared")} for event in uninterrupted[2:]
    ]


def test_a_stopped_run_measures_the_probe_of_its_step_when_it_goes_on(
    run: Run,
    tmp_path: Path,
    stop_in_step: Callable[..., None],  # noqa: F811
) -> None:
    stop_in_step(1, signal.SIGTERM)  # noticed at the end of step 2
    run("stopped", PROBE)
    run("stopped", PROBE, "--resume", str(tmp_path / "stopped" / "mine-step00000002-state"))
    assert [event["step"] for event in of_kind(events_of(tmp_path / "stopped.jsonl"), "forgetting")] == [0, 2, 4]


def test_a_regularisation_subset_as_a_probe_is_rejected(run: Run) -> None:
    done = run("both", f"{PROBE}\nis_reg = true", status=1)
    assert (
        "is_forgetting_probe keeps images out of training, and is_reg trains them; remove one of the two" in done.stderr
    )
