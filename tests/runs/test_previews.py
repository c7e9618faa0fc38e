"""Previews during training, which do not affect training."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.training.evaluation import preview
from library.training.evaluation.drawing import draw_latents
from tests.running import Finished, launch_command

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
    done = train([*base_arguments, *prompts, *EVENTS, "--learning_rate", "0.05"])
    assert done.status == 0, done.stderr
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
    done = train(
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
    )
    assert done.status == 0, done.stderr
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
    done = train([*base_arguments, *options, *previews, "--learning_rate", "0.05"])
    assert done.status == 0, done.stderr
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

    done = train([*base_arguments, *prompts, *EVENTS, "--logging_dir", str(tmp_path / "logs")])
    assert done.status == 0, done.stderr
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
