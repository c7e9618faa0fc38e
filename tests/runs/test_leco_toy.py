"""LECO on the quickstart's toy base model, judged by the pixels of the images it draws."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.toys import check_adapter
from tests.running import ROOT, Finished
from tools.quickstart.sampling import Prompt, load_pipeline, merge_lora, sample
from tools.quickstart.toy_world import Scene, look_at

BASE = ROOT / "configs" / "quickstart" / "toy_base"
NUM_IMAGES = 16


def draw_scenes(caption: str, file: Path | None = None, strength: float = 1.0) -> list[Scene]:
    """Draw images of a caption with fixed seeds, optionally with an adapter, and return the scenes they show."""
    pipeline: Any = load_pipeline(BASE)
    if file is not None:
        up = {key: tensor * strength if "lora_up" in key else tensor for key, tensor in load_file(file).items()}
        merge_lora(pipeline, up)
    return [look_at(image) for image in sample(pipeline, [Prompt(caption, seed) for seed in range(NUM_IMAGES)])]


def train_adapter(train: Callable[..., Finished], prompts: Path, folder: Path, *more: str) -> Path:
    words = [
        "--pretrained_model_name_or_path", str(BASE), "--prompts_file", str(prompts), "--output_dir", str(folder),
        "--output_name", "mine", "--network_dim", "8", "--network_alpha", "8", "--max_denoising_steps", "10", "--seed",
        "3", "--no_report", *more,
    ]  # fmt: skip
    done = train(words, script="train_leco")
    assert done.status == 0, done.stderr
    return folder / "mine.safetensors"


@pytest.mark.nightly
def test_an_erased_concept_is_no_longer_drawn(train: Callable[..., Finished], tmp_path: Path) -> None:
    """The erased shape is drawn no more often than for the empty prompt; other concepts are unchanged."""
    caption, other = "a large red circle on a white background", "a large blue square on a black background"
    (tmp_path / "prompts.toml").write_text(f'[[prompts]]\ntarget = "{caption}"\nresolution = 64\nbatch_size = 2\n')
    file = train_adapter(
        train, tmp_path / "prompts.toml", tmp_path, "--learning_rate", "1e-3", "--max_train_steps", "40"
    )

    def red(scenes: list[Scene]) -> int:
        return sum(scene.colour == "red" for scene in scenes)

    before, after, of_nothing = red(draw_scenes(caption)), red(draw_scenes(caption, file)), red(draw_scenes(""))
    assert before > NUM_IMAGES / 2 and after <= of_nothing < before
    blue = [sum(scene.colour == "blue" for scene in draw_scenes(other, *more)) for more in ((), (file,))]
    assert blue[1] > blue[0] / 2 > 0


@pytest.mark.nightly
def test_a_slider_works_in_both_directions(
    train: Callable[..., Finished], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the documented prompt file, -1 gives more small circles than 0, and 1 at least as many large ones; the
    radius follows the strength."""
    prompts = ROOT / "configs" / "leco" / "toy_slider.toml"
    file = train_adapter(train, prompts, tmp_path, "--learning_rate", "3e-4", "--max_train_steps", "80")
    caption = "a red circle on a white background"
    plain, up, down = draw_scenes(caption), draw_scenes(caption, file), draw_scenes(caption, file, -1.0)

    def count(scenes: list[Scene], size: str) -> int:
        return sum(scene.size == size and (scene.colour, scene.shape) == ("red", "circle") for scene in scenes)

    assert count(up, "large") >= count(plain, "large") > NUM_IMAGES / 2
    assert count(down, "small") > NUM_IMAGES / 2 > count(plain, "small")
    words = [str(file), "--captions", caption, "--strengths=-2,-1,0,1,2", "--count", str(NUM_IMAGES)]
    assert check_adapter.main(words) == 0
    (correlation,) = re.findall(r"rank correlation of strength and radius: (\S+), 80 images", capfd.readouterr().out)
    assert float(correlation) >= 0.9
