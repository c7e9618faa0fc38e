"""--base_arithmetic 8bit: its requirements are checked before weights are read, and which layers use it."""

import logging
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd.assembly import build
from library.base.errors import UserError
from library.memory.codecs.matmul_8bit import FP8
from library.memory.frozen import freeze_layers
from library.options.train import TrainOptions
from library.training.command_line.checks import check
from library.training.models.arithmetic import check_arithmetic, try_kind
from library.training.models.compute import Compute
from library.training.models.frozen_base import use_8bit_matmul
from library.training.models.weight_formats import BaseFormats
from networks.core.protocol import open_network_module
from tests.device_standin import device_without_float64
from tests.unit.training.test_checks import NEEDED
from tests.weight_formats import CODECS, EIGHT_BIT_FORMATS

COMPUTE = Compute(torch.device("cpu"), torch.float32, nullcontext)


def make_options(**values: object) -> TrainOptions:
    named = {**NEEDED, "base_arithmetic": "8bit", **values}
    return TrainOptions.from_args(Namespace(**{**TrainOptions.defaults(), **named}))


def check_device(options: TrainOptions) -> None:
    module = open_network_module(options.network.network_module or "")
    check_arithmetic(BaseFormats.load(options.precision).denoiser, module, build(options), COMPUTE)


@pytest.mark.parametrize("form", EIGHT_BIT_FORMATS)
def test_8_bit_formats_and_one_old_name_are_accepted(form: str) -> None:
    check(make_options(base_format=form))
    check(make_options(fp8_base=True, mixed_precision="bf16"))


def test_a_checkpoint_with_unquantized_weights_is_refused_before_it_is_read(tiny_sd_folder: Path) -> None:
    options = make_options(pretrained_model_name_or_path=str(tiny_sd_folder))
    with pytest.raises(UserError, match=r"the checkpoint has none that can be; add --base_format int8_rotated"):
        check_device(options)


@pytest.mark.parametrize("form", EIGHT_BIT_FORMATS)
def test_only_fp8_on_a_cpu_is_warned_about(form: str, tiny_sd_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = make_options(pretrained_model_name_or_path=str(tiny_sd_folder), base_format=form)
    with caplog.at_level(logging.INFO):
        check_device(options)
    warnings = [message for message in caplog.messages if "--base_arithmetic" in message]
    assert ["thousands of times slower" in message for message in warnings] == [True] * (form == "fp8")


def test_an_unsupported_device_is_refused_with_its_own_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*inputs: Tensor, **more: object) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(UserError, match=r"cannot multiply float8_e4m3fn \(torch._scaled_mm is only .* >= 9.0\); int8"):
        try_kind(FP8, COMPUTE)


def test_a_device_with_wrong_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: original(a, b).roll(1, 0))
    with pytest.raises(UserError, match=r"a product of int8 on this cpu is off by \d+%; leave it out"):
        try_kind(torch.int8, COMPUTE)


def test_products_are_checked_on_a_device_without_float64() -> None:
    with device_without_float64() as device:
        try_kind(torch.int8, Compute(device, torch.float32, nullcontext))


def test_third_party_network_modules_are_warned_about(tiny_sd_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"pretrained_model_name_or_path": str(tiny_sd_folder), "base_format": "int8"}
    for module, is_warned in (("networks.lora", False), ("lycoris.kohya", True)):
        options = make_options(network_module=module, **values)
        caplog.clear()
        check_device(options)
        assert (f"layers that --network_module {module} adapts" in caplog.text) == is_warned


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, 32), nn.Linear(32, 32), nn.Linear(32, 20), nn.Conv2d(8, 8, 3)]
        self.blocks = nn.ModuleList(layers)


def test_layers_that_are_decoded_instead_are_counted_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(64)
    freeze_layers(CODECS["int8"], model.blocks)
    with caplog.at_level(logging.INFO):
        use_8bit_matmul(model)
    assert caplog.messages[-1] == (
        "denoiser: 2 layers multiply in 8 bits; 2 are decoded: 1 whose sizes are no multiples of 8 (int8) or 16 (fp8), "
        "1 convolutions"
    )
    assert [layer.multiplies_codes for layer in model.blocks] == [True, True, False, False]


def test_a_model_without_suitable_layers_is_refused() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3), nn.Linear(9, 8)])
    freeze_layers(CODECS["int8"], model.blocks)
    with pytest.raises(UserError, match="no layer of the denoiser supports 8-bit products"):
        use_8bit_matmul(model)
