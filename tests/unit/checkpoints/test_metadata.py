"""Options in the metadata of files, in the form that readers of LoRA files expect."""

import argparse
import importlib
from collections.abc import Mapping

import pytest

from library.checkpoints.metadata import RunSummary, training_metadata
from tests.running import SCRIPTS

FACTS = RunSummary(
    session_id=1,
    started_at=2.0,
    seed=3,
    num_train_images=4,
    num_validation_images=0,
    num_reg_images=0,
    num_batches_per_epoch=4,
    num_epochs=1,
    max_train_steps=4,
    optimizer="torch.optim.adamw.AdamW",
    has_relative_step=False,
    network_args={},
    datasets={},
    run_digest="0123",
)


def metadata_of(script: str, arguments: str) -> Mapping[str, str]:
    """Return the training metadata of `script` for command-line `arguments`."""
    options_type = SCRIPTS[script].options
    parser = argparse.ArgumentParser()
    options_type.add_to(parser)
    options = options_type.from_args(parser.parse_args(arguments.split()))
    recipe = vars(importlib.import_module(SCRIPTS[script].build.__module__)).get("RECIPE")  # SD has none
    return training_metadata(options, {} if recipe is None else recipe.describe(options), FACTS)


@pytest.mark.parametrize(
    ("script", "rates", "value"),
    [
        ("train_network", "5e-5", "5e-05"),
        ("sdxl_train_network", "5e-5", "5e-05"),
        ("sdxl_train_network", "5e-5 1e-5", "[5e-05, 1e-05]"),
        ("flux_train_network", "5e-5", "[5e-05]"),
        ("flux_train_network", "5e-5 1e-5", "[5e-05, 1e-05]"),
        ("sd3_train_network", "5e-5 1e-5 0", "[5e-05, 1e-05, 0.0]"),
        ("lumina_train_network", "5e-5", "[5e-05]"),
        ("anima_train_network", "5e-5", "[5e-05]"),
        ("hunyuan_image_train_network", "5e-5", "[5e-05]"),
    ],
)
def test_all_text_encoder_learning_rates_are_recorded(script: str, rates: str, value: str) -> None:
    assert metadata_of(script, f"--text_encoder_lr {rates}")["ss_text_encoder_lr"] == value


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_an_unset_text_encoder_learning_rate_is_recorded_as_none(script: str) -> None:
    assert metadata_of(script, "--learning_rate 1e-4")["ss_text_encoder_lr"] == "None"
