"""flux_2_train_network.py on tiny FLUX.2 models: musubi-tuner's commands, previews, and third-party files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.running import Finished
from tests.runs.musubi_tuner import paths_of
from tests.tiny.flux_2 import DIT, build_tiny_flux_2

Train = Callable[..., Finished]

TRAINING = DIT.training + " --model_version klein-base-4b"


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux_2(tmp_path_factory.mktemp("tiny_flux_2"), seed=31)


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux_2(tmp_path_factory.mktemp("tiny_flux_2_dev"), seed=32, is_dev=True)


@pytest.fixture
def train_flux_2(train: Train) -> Train:
    return partial(train, script="flux_2_train_network")


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps, without those of the base model."""
    return [
        "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64", "--train_batch_size",
        "2", "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module",
        "networks.lora_flux_2", "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "2", "--seed",
        "5", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


@pytest.fixture
def arguments(tiny_arguments: list[str], settings: list[str]) -> list[str]:
    return [*tiny_arguments, *settings]


@pytest.fixture
def path_replacements(tiny_arguments: list[str], tmp_path: Path) -> dict[str, str]:
    return paths_of(tiny_arguments, tmp_path)


def test_our_option_names_give_the_same_result(
    train_flux_2: Train, path_replacements: dict[str, str], tmp_path: Path
) -> None:
    theirs = train_flux_2(TRAINING.format(**path_replacements).split())
    words = TRAINING.replace("--dit {dit}", "--pretrained_model_name_or_path {dit}") + (
        " --cache_latents_to_disk --cache_text_encoder_outputs_to_disk"
    )
    ours = train_flux_2(words.format(**path_replacements).replace("flux2_shift", "flux_shift").split())
    assert theirs.status == ours.status == 0, ours.stderr
    assert theirs.losses == ours.losses and len(ours.losses) == 3


def test_musubi_tuners_fp8_and_block_swap_options_train(train_flux_2: Train, path_replacements: dict[str, str]) -> None:
    done = train_flux_2(
        [*TRAINING.format(**path_replacements).split(), "--fp8_base", "--fp8_scaled", "--fp8_text_encoder"]
    )
    assert done.status == 0, done.stderr
    assert "layers in 8 bits" in done.stderr
    done = train_flux_2([*TRAINING.format(**path_replacements).split(), "--blocks_to_swap", "29"])
    assert done.status == 1 and "at most 0" in done.stderr


@pytest.mark.parametrize("version", ["klein-4b", "klein-base-4b", "dev"])
def test_a_preview_uses_the_settings_of_its_model_version(
    train_flux_2: Train, tiny_arguments: list[str], tiny_dev: list[str], settings: list[str], tmp_path: Path,
    version: str,
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 1" + ("" if version == "klein-4b" else " --s 3") + "\n")
    model = tiny_dev if version == "dev" else tiny_arguments
    shown = ["--sample_prompts", str(prompts), "--sample_at_first", "--max_train_steps", "1"]
    done = train_flux_2([*model, *settings, *shown, "--model_version", version])
    assert done.status == 0, done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    assert ("which is distilled" in done.stderr) == (version != "klein-base-4b")
