"""krea2_train_network.py on a tiny Krea 2 model: musubi-tuner's commands, previews, resuming, and third-party
files."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.running import Finished, make_images, small_run
from tests.runs.musubi_tuner import paths_of, run_command
from tests.tiny.krea2 import CONFIG, build_tiny_krea2

Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_krea2(tmp_path_factory.mktemp("tiny_krea2"), seed=31)


@pytest.fixture
def train_krea2(train: Train) -> Train:
    return partial(train, script="krea2_train_network")


@pytest.fixture
def arguments(tiny_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps."""
    return [*tiny_arguments, *small_run(images, tmp_path, "networks.lora_krea2", "2")]


@pytest.mark.nightly
def test_caption_features_are_cached_without_padding(tiny_arguments: list[str], tmp_path: Path) -> None:
    """Features are stored unpadded in 16 bits, and their size is reported before encoding."""
    texts = "--dataset_config {data} --text_encoder {text} --batch_size 2"
    log = run_command("krea2_cache_text_encoder_outputs", texts, paths_of(tiny_arguments, tmp_path))
    num_tokens = []
    for file in (tmp_path / "cache").rglob("*_krea2_te.npz"):
        with np.load(file) as archive:
            states, mask = archive["hidden_state"], archive["attention_mask"]
        assert states.dtype == np.uint16 and states.shape == (len(mask), 12 * CONFIG.fusion.width) and mask.all()
        num_tokens.append(len(mask))
    assert len(num_tokens) == 4 and len(set(num_tokens)) > 1
    size = 2 * 12 * CONFIG.fusion.width * sum(num_tokens) / 1e6
    assert f"caching text encoder outputs of 4 captions on disk, about {size:.1f} MB" in log


def test_commands_for_editing_cache_what_training_reuses(
    train_krea2: Train, tiny_arguments: list[str], tmp_path: Path
) -> None:
    """A data set without references is refused with --edit, by every command."""
    paths = paths_of(tiny_arguments, tmp_path)
    words = "--dit {dit} --dataset_config {data} --output_dir {out} --network_module networks.lora_krea2 --edit"
    train = [*words.format(**paths).split(), "--mixed_precision", "bf16", "--max_train_steps", "1"]
    done = train_krea2(train)
    assert done.status == 1 and "--edit trains on reference images, but no subset of the data set" in done.stderr
    make_images(tmp_path / "before", 3, side=96, seed=1)
    with (tmp_path / "data.toml").open("a") as file:
        file.write(f'control_directory = "{(tmp_path / "before").as_posix()}"\n')
    run_command("krea2_cache_latents", "--dataset_config {data} --vae {vae} --edit", paths)
    texts = "--dataset_config {data} --text_encoder {text} --batch_size 1 --edit"
    run_command("krea2_cache_text_encoder_outputs", texts, paths)
    done = train_krea2(train)
    assert done.status == 0, done.stderr
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert re.search(r"text cache: \d files reused, 0 to encode", done.stderr)


def test_previews_use_turbo_and_do_not_change_training(
    train_krea2: Train, arguments: list[str], tmp_path: Path
) -> None:
    """The adapter starts at 0, so the first image is Turbo's; losses equal those without previews, bit for bit."""
    turbo = build_tiny_krea2(tmp_path / "other", seed=77, name="turbo")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 1\n")
    shown = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "1"]
    plain = train_krea2(arguments)
    for more in ([], ["--base_format", "int8"]):
        out = tmp_path / f"out{len(more)}"
        done = train_krea2([*arguments, *shown, *more, "--turbo_dit", turbo[1], "--output_dir", str(out)])
        assert done.status == 0, done.stderr
        images = [path.read_bytes() for path in sorted((out / "sample").glob("*.png"))]
        assert len(images) == 3 and len(set(images)) == 3
        if not more:
            assert done.losses == plain.losses and len(done.losses) == 2
    turbo_arguments = ["--output_dir", str(tmp_path / "turbo"), "--max_train_steps", "1"]
    other = train_krea2([arguments[0], turbo[1], *arguments[2:], *shown, *turbo_arguments])
    assert other.status == 0 and "is Krea 2 Turbo, which is distilled" in other.stderr
    before = [next((tmp_path / name / "sample").glob("*_e000000_*.png")).read_bytes() for name in ("out0", "turbo")]
    assert before[0] == before[1]
    first, two = (load_file(tmp_path / name / "mine.safetensors") for name in ("out", "out0"))
    assert all(torch.equal(first[key], two[key]) for key in first)
