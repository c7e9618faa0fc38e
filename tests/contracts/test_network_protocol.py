"""The protocol between the trainer and network modules, our own and third-party ones."""

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.checkpoints.files import load_state_dict
from library.options.network_args import parse_network_args
from networks.core.protocol import adopt, open_network_module
from tests.unit.networks.toy import toy_models


def test_network_args_split_at_the_first_equals_sign_and_stay_strings() -> None:
    assert parse_network_args(["conv_dim=8", "network_reg_dims=a=4,b=8", "empty="]) == {
        "conv_dim": "8",
        "network_reg_dims": "a=4,b=8",
        "empty": "",
    }
    assert parse_network_args(None) == {}


def test_a_repeated_key_takes_its_last_value_and_a_warning_names_both(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse_network_args(["conv_dim=8", "conv_dim=4"]) == {"conv_dim": "4"}
    assert "conv_dim is given twice; 4 counts, not 8" in caplog.text


@pytest.mark.parametrize("item", ["conv_dim", "=8", ""])
def test_an_argument_without_an_equals_sign_is_named_in_the_error(item: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--network_args {item!r} has no '='")):
        parse_network_args([item])


def test_networks_lora_imports_and_accepts_the_trainers_arguments() -> None:
    module = open_network_module("networks.lora")
    text, unet = toy_models(301)
    network = module.create_network(1.0, 4, 1.0, None, text, unet, neuron_dropout=0.1, dropout=0.1, rank_dropout="0.2")  # type: ignore[arg-type]
    other, tensors = module.create_network_from_weights(
        1.0, "file", None, text, unet, weights_sd=network.state_dict(), dropout=None  # type: ignore[arg-type]
    )  # fmt: skip
    assert other.state_dict().keys() == tensors.keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("networks.lorra", "there is no such module; did you mean networks.lora?"),
        ("my_own_file", "there are: networks.boft, networks.dylora, networks.loha, networks.lokr, networks.lora,"),
        ("networks.core.targets.targets", "it lacks the function create_network"),
    ],
)
def test_the_error_for_a_module_that_cannot_be_imported_names_it_and_the_remedy(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        open_network_module(name)
    assert f"--network_module {name}" in str(caught.value)


@pytest.fixture
def third_party_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "users_network.py"
    sys.modules.pop("users_network", None)


def test_a_missing_dependency_of_the_module_is_named(third_party_file: Path) -> None:
    third_party_file.write_text("import a_package_nobody_has\n")
    with pytest.raises(ValueError, match="users_network: this needs the package a-package-nobody-has"):
        open_network_module("users_network")


def test_a_module_that_cannot_load_files_raises_an_error_that_says_so(third_party_file: Path) -> None:
    third_party_file.write_text("def create_network(*_, **__): ...\n")
    module = open_network_module("users_network")
    with pytest.raises(ValueError, match=r"--dim_from_weights and --base_weights do not work with .*users_network"):
        module.create_network_from_weights(1.0, "x", None, None, None)  # type: ignore[arg-type]


def test_a_failed_assertion_in_a_third_party_module_names_the_file_and_the_remedy(third_party_file: Path) -> None:
    """LyCORIS asserts where its preset names a layer of the base model twice."""
    text = "def create_network(*_, **__): ...\ndef create_network_from_weights(*_, **__): assert False, 'twice'\n"
    third_party_file.write_text(text)
    with pytest.raises(ValueError, match=r"users_network cannot read x\.pt .*\(twice\).*use one of networks\.\*"):
        open_network_module("users_network").create_network_from_weights(1.0, "x.pt", None, None, None)  # type: ignore[arg-type]


class MinimalNetwork(nn.Module):
    """A network with only the required methods, in the oldest form: two learning rates, no names."""

    def __init__(self) -> None:
        super().__init__()
        self.te, self.unet, self.idle = (nn.Parameter(torch.ones(2) * i) for i in (1, 2, 3))
        self.calls: list[Any] = []

    def apply_to(self, text_encoder: Any, unet: Any, te: bool, un: bool) -> None:
        self.calls.append(("apply_to", te, un))

    def prepare_optimizer_params(self, text_encoder_lr: float | None, unet_lr: float | None) -> list[dict[str, Any]]:
        self.calls.append(("lr", text_encoder_lr, unet_lr))
        return [
            {"params": [self.te], "lr": text_encoder_lr},
            {"params": iter([self.unet])},
            {"params": [], "lr": 1.0},
            {"params": [self.idle], "lr": 0.0},
        ]

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        torch.save({"te": self.te.detach().to(dtype), "unet": self.unet.detach()}, file)


def test_a_minimal_network_can_be_trained() -> None:
    least = MinimalNetwork()
    network = adopt(least)
    text, unet = toy_models(302)
    network.apply_to(text, unet, True, False)
    groups, names = network.parameter_groups([1e-4, 2e-4], 3e-4, 1e-3)
    assert least.calls == [("apply_to", True, False), ("lr", 1e-4, 3e-4)]
    assert names is None
    assert [(g["params"][0] is p, g.get("lr")) for g, p in zip(groups, (least.te, least.unet), strict=True)] == [
        (True, 1e-4),
        (True, None),
    ]
    network.enable_gradient_checkpointing()
    least.requires_grad_(False).eval()
    network.prepare_gradients(text, unet)
    network.start_epoch(text, unet)
    network.start_step(text, unet)
    network.start_optimizer_step(7, 0)
    assert least.training and len(network.trainable_parameters()) == 3


def test_options_that_a_minimal_network_does_not_support_are_named_in_the_error() -> None:
    network = adopt(MinimalNetwork())
    for call, option in (
        (lambda: network.load_weights("x"), "--network_weights"),
        (lambda: network.set_multiplier(0.0), "differential output preservation"),
        (lambda: network.limit_norms(1.0, "cpu"), "--scale_weight_norms"),
        (lambda: network.merge_to(None, nn.Identity(), {}, torch.float32, "cpu"), "--base_weights"),
    ):
        with pytest.raises(ValueError, match=f"{option} does not work with this --network_module"):
            call()


def test_on_optimizer_step_start_receives_seed_and_step_before_each_batch() -> None:
    class WithStepHook(MinimalNetwork):
        def on_optimizer_step_start(self, seed: int, step: int) -> None:
            self.calls.append((seed, step))

    asking = WithStepHook()
    network = adopt(asking)
    for step in (0, 0, 1):
        network.start_optimizer_step(7, step)
    assert asking.calls == [(7, 0), (7, 0), (7, 1)]


class WithGroupNames(MinimalNetwork):
    """A network that takes three learning rates and names its parameter groups."""

    def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any, learning_rate: Any) -> Any:  # type: ignore[override]
        rates = (text_encoder_lr, 0, unet_lr or learning_rate)
        groups = [{"params": [p], "lr": lr} for p, lr in zip((self.te, self.idle, self.unet), rates, strict=True)]
        return groups, ["text", "idle", "unet"]


def test_group_names_stay_aligned_when_groups_are_dropped() -> None:
    groups, names = adopt(WithGroupNames()).parameter_groups([1e-4], None, 1e-3)
    assert (names, [g["lr"] for g in groups]) == (["text", "unet"], [1e-4, 1e-3])
    groups, names = adopt(WithGroupNames()).parameter_groups(None, None, 1e-3)
    assert (names, [g["lr"] for g in groups]) == (["unet"], [1e-3])


def test_a_type_error_inside_the_network_is_not_mistaken_for_an_old_signature() -> None:
    class Broken(WithGroupNames):
        def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any, learning_rate: Any) -> Any:
            return len(unet_lr)

    with pytest.raises(TypeError, match="float"):
        adopt(Broken()).parameter_groups([1e-4], 1e-4, 1e-3)


def test_learning_rates_of_0_everywhere_are_an_error() -> None:
    with pytest.raises(ValueError, match="nothing would be trained: every part of the adapter has the learning rate 0"):
        adopt(WithGroupNames()).parameter_groups([0.0], 0.0, 0.0)


def test_a_network_without_modules_is_not_blamed_on_the_learning_rate() -> None:
    class Empty(WithGroupNames):
        def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any, learning_rate: Any) -> Any:
            return [{"params": [], "lr": 1e-3}]

    with pytest.raises(ValueError, match="attached to no layer of this base model"):
        adopt(Empty()).parameter_groups([1e-4], 1e-4, 1e-3)


@pytest.mark.parametrize(("thing", "message"), [(None, "gave None"), (nn.Linear(1, 1), "it lacks apply_to")])
def test_an_object_that_is_not_a_network_is_rejected(thing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adopt(thing)


class FullDisk(MinimalNetwork):
    """A network whose saving fails halfway."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")


def test_third_party_networks_never_leave_partial_files(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    adopt(MinimalNetwork()).save_weights(path, torch.float16, {})
    assert load_state_dict(path)["te"].dtype == torch.float16
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        adopt(FullDisk()).save_weights(path, None, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


class CopiesLayout(MinimalNetwork):
    """A network whose weight has the layout of the convolution that it replaces, as in LyCORIS' algo=full."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last))

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        save_file(self.state_dict(), file, metadata)


def test_weights_in_the_layout_of_a_convolution_are_saved(tmp_path: Path) -> None:
    network = CopiesLayout()
    adopt(network).save_weights(tmp_path / "x.safetensors", None, {})
    assert torch.equal(load_state_dict(tmp_path / "x.safetensors")["kernel"], network.kernel)
    assert not network.state_dict()["kernel"].is_contiguous(), "the network itself is left as it is"


def test_our_network_supports_the_whole_protocol(tmp_path: Path) -> None:
    text, unet = toy_models(303)
    module = open_network_module("networks.lora")
    network = adopt(module.create_network(1.0, 2, 2.0, None, text, unet, neuron_dropout=None))  # type: ignore[arg-type]
    network.apply_to(text, unet, True, True)
    groups, names = network.parameter_groups([1e-3], 1e-2, 1e-1)
    assert names == ["textencoder", "unet"]
    optimizer = torch.optim.AdamW(groups)
    network.enable_gradient_checkpointing()
    network.prepare_gradients(text, unet)
    network.start_epoch(text, unet)
    x_BCHW, x_BTC = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 7)
    losses = []
    for _ in range(8):
        network.start_step(text, unet)
        loss = unet(x_BCHW).square().mean() + text(x_BTC).sub(1).square().mean()
        loss.backward()
        assert len(network.trainable_parameters()) == 16
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.99
    network.set_multiplier(0.0)
    base = unet(x_BCHW)
    network.set_multiplier(1.0)
    assert not torch.equal(unet(x_BCHW), base)
    network.save_weights(tmp_path / "x.safetensors", None, {"ss_steps": "8"})
    again = adopt(module.create_network(1.0, 2, 2.0, None, *toy_models(304)))  # type: ignore[arg-type]
    again.apply_to(*toy_models(304), True, True)
    again.load_weights(tmp_path / "x.safetensors")
    assert torch.equal(
        again.module.state_dict()["lora_unet_mid_attention_to_q.lora_up.weight"],
        network.module.state_dict()["lora_unet_mid_attention_to_q.lora_up.weight"],
    )
