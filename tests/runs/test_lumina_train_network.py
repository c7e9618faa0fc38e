"""lumina_train_network.py on a tiny Lumina Image 2.0 model: every adapter kind trains, saves and resumes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.running import Finished, small_run
from tests.tiny.lumina import build_tiny_lumina

Train = Callable[..., Finished]
SYSTEM = "be a good red dog"


@pytest.fixture(scope="session")
def tiny_lumina_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_lumina(tmp_path_factory.mktemp("tiny_lumina"), seed=31)


@pytest.fixture
def arguments(tiny_lumina_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for three training steps."""
    words = ["--gemma2_max_token_length", "60", "--system_prompt", SYSTEM]
    return [*tiny_lumina_arguments, *small_run(images, tmp_path, "networks.lora_lumina", "3"), *words]


@pytest.fixture
def train_lumina(train: Train) -> Train:
    return partial(train, script="lumina_train_network")


@pytest.mark.nightly
def test_captions_cached_with_another_system_prompt_are_encoded_again(
    train_lumina: Train, arguments: list[str]
) -> None:
    words = [*arguments, "--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"]
    for more, message in (
        ([], "to encode, 0 stale"),
        ([], " 0 to encode, 0 stale"),
        (["--system_prompt", "be bad"], "7 stale"),
    ):
        done = train_lumina([*words, *more])
        assert done.status == 0 and message in done.stderr, done.stderr
