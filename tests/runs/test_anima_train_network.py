"""anima_train_network.py on a tiny Anima model: every adapter kind trains, saves and resumes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.running import Finished, small_run
from tests.tiny.anima import build_tiny_anima

Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny_anima_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_anima(tmp_path_factory.mktemp("tiny_anima"), seed=41)


@pytest.fixture
def arguments(tiny_anima_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps, on the tiny model."""
    words = ["--qwen3_max_token_length", "32", "--t5_max_token_length", "32"]
    return [*tiny_anima_arguments, *small_run(images, tmp_path, "networks.lora_anima", "2"), *words]


@pytest.fixture
def train_anima(train: Train) -> Train:
    return partial(train, script="anima_train_network")


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
