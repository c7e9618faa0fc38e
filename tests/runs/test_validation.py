"""Validation in complete runs measures held-out images and does not affect training."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.running import Finished

Train = Callable[..., Finished]


@pytest.fixture
def split_arguments(base_arguments: list[str]) -> list[str]:
    """Return arguments for two epochs of four steps: four of six images train twice per epoch, two are held out."""
    return [*base_arguments, "--validation_split", "0.34", "--max_train_epochs", "2", "--console_log_simple"]


def charts(folder: Path) -> EventAccumulator:
    (run,) = folder.iterdir()
    return EventAccumulator(str(run / "network_train")).Reload()


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


CHANCE = [
    "--network_dropout", "0.3", "--network_args", "rank_dropout=0.3", "--flip_aug", "--shuffle_caption",
    "--caption_dropout_rate", "0.2",
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        [*CHANCE, "--cache_latents"],
        [*CHANCE, "--random_crop", "--optimizer_type", "AdamWScheduleFree", "--max_data_loader_n_workers", "1"],
        pytest.param(
            ["--network_train_unet_only", "--gradient_checkpointing", "--mixed_precision", "bf16"],
            marks=pytest.mark.nightly,
        ),
        pytest.param(["--network_module", "networks.dylora", "--network_args", "unit=2"], marks=pytest.mark.nightly),
    ],
    ids=["dropout", "schedule-free", "frozen-text", "dylora"],
)
def test_validation_does_not_change_training(
    train: Train, split_arguments: list[str], tmp_path: Path, options: list[str]
) -> None:
    results = {}
    for name, when in {
        "often": ["--validate_every_n_steps", "1", "--validate_at_first", "--keep_best_checkpoint"],
        "never": ["--validate_every_n_epochs", "100"],
    }.items():
        out, logs = tmp_path / name, tmp_path / f"{name} logs"
        done = train([*split_arguments, *options, *when, "--output_dir", str(out), "--logging_dir", str(logs)])
        assert done.status == 0, done.stderr + done.stdout
        events = charts(logs)
        has_validation = any("validation" in tag for tag in events.Tags()["scalars"])
        assert has_validation == (name == "often")
        results[name] = scalars(events, "loss/current"), load_file(out / "mine.safetensors")
    assert results["often"][0] == results["never"][0] and len(results["never"][0]) == 8
    often, never = results["often"][1], results["never"][1]
    assert often.keys() == never.keys() and all(torch.equal(often[key], never[key]) for key in never)


def test_training_equals_that_of_a_folder_without_the_held_out_images(
    train: Train, split_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    train([*split_arguments, "--validation_seed", "3", "--cache_latents_to_disk", "--output_dir", str(tmp_path / "a")])
    from tests.unit.data.builders import options_of, plan_of, validation_of

    arguments = ["--train_data_dir", str(images), "--validation_split", "0.34"]
    plan = plan_of(options_of("--resolution 64 --validation_seed 3", *arguments))
    aside = [key for batch in validation_of(plan).batches([0, 1], 0) for key in batch.keys]
    assert len(aside) == 2
    for path in aside:
        Path(path).unlink()
    arguments = [word for word in split_arguments if word not in ("--validation_split", "0.34")]
    train([*arguments, "--cache_latents_to_disk", "--output_dir", str(tmp_path / "b")])
    first, second = (load_file(tmp_path / name / "mine.safetensors") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first | second)


def test_validation_is_shown_in_charts_metadata_and_log(
    train: Train, split_arguments: list[str], tmp_path: Path
) -> None:
    options = ["--logging_dir", str(tmp_path / "logs"), "--validate_every_n_steps", "3", "--validate_at_first"]
    options += ["--validate_every_n_epochs", "1"]
    done = train([*split_arguments, *options, "--max_validation_steps", "2", "--validation_seed", "3"]).ok()
    assert "training: 8 images with repeats, 2 for validation\n" in done.stdout
    assert not re.search(r"^[^\r\n]*validation steps.*avr_loss=", done.stderr, re.MULTILINE)
    assert "validation steps" in done.stderr and "epoch validation steps" in done.stderr

    events = charts(tmp_path / "logs")
    steps, epochs = (scalars(events, f"loss/validation/{kind}_average") for kind in ("step", "epoch"))
    assert [step for step, _ in steps] == [0, 3, 6] and [epoch for epoch, _ in epochs] == [1, 2]
    levels = [dict(scalars(events, f"loss/validation/level_{level}")) for level in (200, 400, 600, 800)]
    assert all(list(level) == [0, 3, 4, 6, 8] for level in levels)
    averages = dict(steps) | {epoch * 4: value for epoch, value in epochs}
    for step, average in averages.items():
        assert average == pytest.approx(sum(level[step] for level in levels) / 4, rel=1e-6)  # charts are float32
    difference = dict(scalars(events, "loss/validation/difference"))
    assert list(difference) == [3, 4, 6, 8]
    for step, value in difference.items():
        assert value == pytest.approx(averages[step] - averages[0], rel=1e-5, abs=1e-6)
    training = dict(scalars(events, "loss/average"))
    for step, value in scalars(events, "loss/validation/step_divergence"):
        assert value == pytest.approx(averages[step] - training[step], rel=1e-5, abs=1e-6)

    lines = re.findall(r"validation (?:after|before).*", done.stdout)
    assert len(lines) == 5
    assert (
        lines[0].startswith("validation before the first step: loss ") and "on 2 images (noise level 200: " in lines[0]
    )
    assert all(re.search(r"; \d\.\d{4} ± \d\.\d{4} (below|above) that after step 0", line) for line in lines[1:])

    with safe_open(tmp_path / "out" / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_num_train_images"] == "8" and metadata["ss_num_validation_images"] == "2"
    assert metadata["ss_validation_split"] == "0.34" and metadata["ss_validation_seed"] == "3"
    assert metadata["ss_validate_every_n_steps"] == "3" and metadata["ss_validate_every_n_epochs"] == "1"
    assert metadata["ss_max_validation_steps"] == "2"
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_thing": {"n_repeats": 2, "img_count": 4}}


def test_unchanged_weights_give_the_same_validation_loss(
    train: Train, split_arguments: list[str], tmp_path: Path
) -> None:
    """The learning rate of 1e-45 is 0 in float32 arithmetic; images are encoded again each time."""
    options = ["--logging_dir", str(tmp_path / "logs"), "--validate_every_n_steps", "1", "--optimizer_type", "SGD"]
    options = [*options, "--optimizer_args", "momentum=0", "--learning_rate", "1e-45", *CHANCE]
    done = train([*split_arguments, *options])
    assert done.status == 0, done.stdout
    values = scalars(charts(tmp_path / "logs"), "loss/validation/step_average")
    assert len(values) == 8 and len({value for _, value in values}) == 1
    assert set(scalars(charts(tmp_path / "logs"), "loss/validation/difference")) == {
        (step, 0.0) for step in range(2, 9)
    }


def test_the_best_file_has_the_weights_of_its_step(train: Train, split_arguments: list[str], tmp_path: Path) -> None:
    options = ["--validate_every_n_steps", "1", "--keep_best_checkpoint", "--save_every_n_steps", "1"]
    done = train([*split_arguments, *options, "--learning_rate", "0.1"])
    assert done.status == 0
    lines = re.findall(r"validation after step (\d+): loss (\d+\.\d+)", done.stdout)
    best = min(lines, key=lambda line: float(line[1]))[0]
    best_weights = load_file(tmp_path / "out" / "mine-best.safetensors")
    path = tmp_path / "out" / f"mine-step{int(best):08d}.safetensors"
    assert all(torch.equal(tensor, best_weights[key]) for key, tensor in load_file(path).items())
    with safe_open(tmp_path / "out" / "mine-best.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == best
    assert int(best) < 8  # the large rate overshoots; otherwise the last file would be the best


def test_a_resumed_run_validates_like_the_uninterrupted_one(
    train: Train, split_arguments: list[str], tmp_path: Path
) -> None:
    when = ["--validate_every_n_steps", "2", "--validate_at_first", "--save_state", "--save_every_n_steps", "2"]
    uninterrupted = train([*split_arguments, *when, "--output_dir", str(tmp_path / "whole")])
    train([*split_arguments, *when, "--output_dir", str(tmp_path / "cut")])
    state = tmp_path / "cut" / "mine-step00000004-state"
    resumed = train([*split_arguments, *when, "--output_dir", str(tmp_path / "cut"), "--resume", str(state)])
    assert resumed.status == 0, resumed.stdout
    expected, actual = (re.findall(r"validation (?:after|before).*", run.stdout) for run in (uninterrupted, resumed))
    assert len(expected) == 5 and actual == expected[3:]  # before the first step and after 2, 4, 6, 8

    other = train([*split_arguments, *when, "--resume", str(state), "--min_timestep", "100"])
    assert "validation measures other images, noise levels or noise than in the state" in other.stdout


@pytest.mark.parametrize("options", [[], ["--cache_latents"]], ids=["encoded", "cached"])
def test_renamed_copies_of_a_validation_set_have_the_same_loss(
    train: Train, split_arguments: list[str], images: Path, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "copy" / "1_other").mkdir(parents=True)
    for number, image in enumerate(sorted(images.rglob("*.png"), reverse=True)):
        for suffix in (".png", ".txt"):
            target = tmp_path / "copy" / "1_other" / f"{number}{suffix}"
            target.write_bytes(image.with_suffix(suffix).read_bytes())
    losses = []
    for folder in (images, tmp_path / "copy"):
        words = [*split_arguments, "--train_data_dir", str(folder), "--validate_at_first", "--max_train_steps", "1"]
        train([*words, "--logging_dir", str(tmp_path / f"logs of {folder.name}"), *options]).ok()
        losses.append(scalars(charts(tmp_path / f"logs of {folder.name}"), "loss/validation/step_average")[0])
    assert losses[0] == losses[1]
