"""Programs that replace methods of the trainers, as forks and plug-ins of sd-scripts do."""

import argparse
from typing import Any

import pytest

import flux_train_network
import sdxl_train_network
import train_network
from library import train_util
from library.errors import UserError
from library.training.command_line.replaced import NEVER_CALLED
from tests.contracts.test_programs_that_import import TRAINERS

MISSING = "--resolution is not set"  # the first thing that a run with these options lacks
ARGS = {"pretrained_model_name_or_path": "none.safetensors", "train_data_dir": "none", "output_dir": "none"}


def started(trainer: Any) -> str:
    """Return the message to a program that calls `train` on a trainer without a size."""
    with pytest.raises(UserError) as refused:
        trainer.train(argparse.Namespace(**ARGS))
    return str(refused.value)


class WithImages(flux_train_network.FluxNetworkTrainer):
    """As a plug-in with a loss and previews of its own."""

    def sample_images(self, *args: Any) -> None: ...

    def get_noise_pred_and_target(self, *args: Any) -> None: ...

    def post_process_network(self, *args: Any) -> None: ...


class WithOwnMethods(flux_train_network.FluxNetworkTrainer):
    """As a program that does something before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_folders(self) -> None:
        self.calls.append("before")

    def train(self, args: argparse.Namespace) -> None:
        self.prepare_folders()
        super().train(args)


def test_methods_that_nobody_calls_are_refused_with_what_does_their_work() -> None:
    said = started(WithImages())
    assert "this program replaces methods of WithImages that are never called here: sample_images (--log_events" in said
    assert "get_noise_pred_and_target (a base model is a package" in said
    assert "post_process_network (--network_module takes a module of your own" in said


def test_methods_of_another_name_and_a_train_around_ours_work(fresh_process: None) -> None:
    trainer = WithOwnMethods()
    assert MISSING in started(trainer)
    assert trainer.calls == ["before"]


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_put_into_the_first_trainer_counts_for_all(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a program does that puts its own previews into NetworkTrainer and trains SDXL."""
    monkeypatch.setattr(train_network.NetworkTrainer, "sample_images", lambda *args: None, raising=False)
    assert "never called here: sample_images" in started(TRAINERS[name][1]())


@pytest.mark.parametrize("method", [method for methods in NEVER_CALLED.values() for method in methods])
def test_every_method_that_the_table_names_is_refused(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    trainer = sdxl_train_network.SdxlNetworkTrainer()
    assert not {method} & set(dir(trainer)), "it is there, and called"
    monkeypatch.setattr(trainer, method, lambda *args: None, raising=False)
    assert f"never called here: {method} (" in started(trainer)


def test_what_is_put_into_a_module_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, fresh_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert MISSING in started(train_network.NetworkTrainer())
    assert "has no effect: nothing here uses it" not in caplog.text
    monkeypatch.setattr(train_util, "sample_images_common", print, raising=False)
    monkeypatch.setattr(train_util, "BucketManager", object)
    assert MISSING in started(train_network.NetworkTrainer())
    assert "sets BucketManager, sample_images_common of library.train_util, which has no effect" in caplog.text
