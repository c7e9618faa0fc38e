"""Programs that replace methods of the trainers, as forks and plug-ins of sd-scripts do."""

import argparse
from typing import Any

import pytest

import flux_train_network
import sdxl_train_network
import train_network
from library import train_util
from library.base.errors import UserError
from library.training.command_line.replaced import NEVER_CALLED
from tests.contracts.test_programs_that_import import TRAINERS

MISSING = "No data found: --train_data_dir none does not exist"
ARGS = {"pretrained_model_name_or_path": "owner/none", "train_data_dir": "none", "output_dir": "none"}


def start_error(trainer: Any) -> str:
    """Call `train` without a resolution and return the error message."""
    with pytest.raises(UserError) as refused:
        trainer.train(argparse.Namespace(**ARGS))
    return str(refused.value)


class WithImages(flux_train_network.FluxNetworkTrainer):
    """A plug-in with its own loss and previews."""

    def sample_images(self, *args: Any) -> None: ...

    def get_noise_pred_and_target(self, *args: Any) -> None: ...

    def post_process_network(self, *args: Any) -> None: ...


class WithOwnMethods(flux_train_network.FluxNetworkTrainer):
    """A program that wraps training with its own steps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_folders(self) -> None:
        self.calls.append("before")

    def train(self, args: argparse.Namespace) -> None:
        self.prepare_folders()
        super().train(args)


def test_overriding_methods_that_are_never_called_is_rejected_with_an_alternative() -> None:
    message = start_error(WithImages())
    assert (
        "this program replaces methods of WithImages that are never called here: sample_images (--log_events" in message
    )
    assert "get_noise_pred_and_target (a base model is a package" in message
    assert "post_process_network (--network_module takes your own module" in message


def test_additional_methods_and_a_wrapped_train_work(fresh_process: None) -> None:
    trainer = WithOwnMethods()
    assert MISSING in start_error(trainer)
    assert trainer.calls == ["before"]


@pytest.mark.parametrize("name", TRAINERS)
def test_methods_replaced_on_the_base_trainer_count_for_all(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A program replaces the previews of NetworkTrainer and trains SDXL."""
    monkeypatch.setattr(train_network.NetworkTrainer, "sample_images", lambda *args: None, raising=False)
    assert "never called here: sample_images" in start_error(TRAINERS[name][1]())


@pytest.mark.parametrize("method", [method for methods in NEVER_CALLED.values() for method in methods])
def test_every_method_in_the_table_is_rejected(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    trainer = sdxl_train_network.SdxlNetworkTrainer()
    assert not {method} & set(dir(trainer)), "it is there, and called"
    monkeypatch.setattr(trainer, method, lambda *args: None, raising=False)
    assert f"never called here: {method} (" in start_error(trainer)


def test_replacing_a_module_function_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, fresh_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert MISSING in start_error(train_network.NetworkTrainer())
    assert "has no effect: nothing here uses it" not in caplog.text
    monkeypatch.setattr(train_util, "sample_images_common", print, raising=False)
    monkeypatch.setattr(train_util, "BucketManager", object)
    assert MISSING in start_error(train_network.NetworkTrainer())
    assert "sets BucketManager, sample_images_common of library.train_util, which has no effect" in caplog.text
