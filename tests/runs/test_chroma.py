"""flux_train_network.py --model_type chroma on a tiny model: adapter kinds, captions, previews and tools."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.checkpoints.files import read_metadata
from tests.running import Finished, small_run
from tests.tiny.chroma import build_tiny_chroma
from tools import merge_flux_lora

Train = Callable[..., Finished]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_chroma(tmp_path_factory.mktemp("tiny_chroma"), seed=33)


@pytest.fixture
def run(train: Train, tiny: list[str], images: Path, tmp_path: Path) -> Callable[..., Finished]:
    """Return `run(name, ...)`, which trains three steps with common options."""
    own = "--t5xxl_max_token_length 32 --model_prediction_type raw --guidance_scale 0 --timestep_sampling sigmoid"
    words = [*tiny, *small_run(images, tmp_path, "networks.lora_flux", "3"), *own.split()]
    start = partial(train, script="flux_train_network")
    return lambda name, *more: start([*words, "--output_name", name, *more])


def test_negative_prompt_and_guidance_scale_change_the_image(run: Callable[..., Finished], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    size = "--w 64 --h 48 --s 2 --d 1"
    lines = [
        f"a red cat {size} {more}" for more in ("--l 1 --g 0", "--l 4 --g 0", "--l 4 --g 0 --n a dog", "--n a dog")
    ]
    prompts.write_text("\n".join(lines) + "\n")
    done = run("a", "--sample_prompts", str(prompts), "--sample_at_first", "--max_train_steps", "1")
    assert done.status == 0, done.stderr
    images = [Image.open(path).tobytes() for path in sorted((tmp_path / "out" / "sample").glob("*_e000000_*.png"))]
    assert len(images) == 4 and len(set(images[:3])) == 3
    assert images[3] == images[2], "what a prompt that says nothing gets"


def test_a_trained_file_merges_into_the_checkpoint(
    run: Callable[..., Finished], tiny: list[str], tmp_path: Path
) -> None:
    assert run("a").status == 0
    lora, merged = tmp_path / "out" / "a.safetensors", tmp_path / "merged.safetensors"
    words = ["--flux_model", tiny[1], "--models", str(lora), "--ratios", "1", "--save_to", str(merged)]
    assert merge_flux_lora.main(words) == 0
    before, after, file = load_file(tiny[1]), load_file(merged), load_file(lora)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    stems = {key.removesuffix(".weight").replace(".", "_") for key in changed}
    assert {f"lora_unet_{stem}" for stem in stems} == {key.split(".")[0] for key in file}
    assert read_metadata(merged)["modelspec.architecture"] == "chroma"
