"""anima_train_network.py on a tiny Anima model: every adapter kind trains, saves and resumes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.running import Finished
from tests.tiny.anima import build_tiny_anima

Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny_anima_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_anima(tmp_path_factory.mktemp("tiny_anima"), seed=41)


@pytest.fixture
def common_arguments(images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps, without those of the base model."""
    return [
        "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64",
        "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module",
        "networks.lora_anima", "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "2", "--seed", "5",
        "--max_data_loader_n_workers", "0", "--qwen3_max_token_length", "32", "--t5_max_token_length", "32",
    ]  # fmt: skip


@pytest.fixture
def arguments(tiny_anima_arguments: list[str], common_arguments: list[str]) -> list[str]:
    return [*tiny_anima_arguments, *common_arguments]


@pytest.fixture
def train_anima(train: Train) -> Train:
    return partial(train, script="anima_train_network")


def load_saved(tmp_path: Path, name: str = "mine") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


def test_llm_adapter_path_replaces_the_models_text_adapter(
    train_anima: Train, arguments: list[str], tmp_path: Path
) -> None:
    build_tiny_anima(tmp_path, seed=43)
    other = ["--llm_adapter_path", str(tmp_path / "anima.safetensors")]
    losses = []
    for flags in ([], other):
        done = train_anima([*arguments, "--network_train_unet_only", *flags])
        assert done.status == 0, done.stderr
        losses.append(done.losses)
    assert losses[0] != losses[1]
