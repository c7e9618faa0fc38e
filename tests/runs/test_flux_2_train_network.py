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


@pytest.fixture
def train_flux_2(train: Train) -> Train:
    return partial(train, script="flux_2_train_network")


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
