"""Adapted layers against PEFT: equal factors give equal outputs and gradients."""

from pathlib import Path

import pytest
import torch
from torch import nn

from networks.core.changes.low_rank import LowRank
from networks.core.targets.targets import adaptation_kind
from tests.tolerances import FLOAT32_DEEP, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double
from tools import merge_lora

peft = pytest.importorskip("peft")

SHAPES = {
    "linear": (lambda: nn.Linear(11, 6), (2, 5, 11)),
    "conv": (lambda: nn.Conv2d(11, 6, 3, stride=2, padding=1), (2, 11, 6, 6)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_equal_those_of_peft(name: str) -> None:
    make, shape = SHAPES[name]
    torch.manual_seed(431)
    layer = make().double().requires_grad_(False)
    wrapped = nn.Sequential(make()).double()
    wrapped[0].load_state_dict(layer.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=3.0, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(wrapped, config).double()
    their_down, their_up = (p for p in theirs.parameters() if p.requires_grad)

    kind = adaptation_kind(layer)
    assert kind is not None
    ours = double(adapter_on(layer, LowRank(layer, 4), 3.0))
    ours.change.load_state_dict(
        {"alpha": ours.change.alpha, "lora_down.weight": their_down, "lora_up.weight": their_up}
    )
    ours.install()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x), **FLOAT64)
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.change.get_parameter("lora_down.weight").grad, their_down.grad, **FLOAT64)
    torch.testing.assert_close(ours.change.get_parameter("lora_up.weight").grad, their_up.grad, **FLOAT64)
    assert their_down.grad.abs().max() > 0.01


@torch.no_grad()
def test_a_folder_saved_by_peft_merges_into_a_checkpoint_as_in_peft(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """Its names lack a model prefix, and its alphas are stored in the folder's config."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "conv1"], alpha_pattern={"conv1": 1}, use_rslora=True,
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(433)
    theirs = peft.get_peft_model(unet, config)
    theirs.save_pretrained(str(tmp_path / "saved"))
    generator = torch.Generator().manual_seed(434)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    text_BTC = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    expected = theirs(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample
    words = [
        "--sd_model",
        str(tiny_sd_folder),
        "--models",
        str(tmp_path / "saved"),
        "--save_to",
        str(tmp_path / "merged"),
    ]
    assert merge_lora.main(words) == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    actual = merged(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample
    alone = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    assert (alone(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample - expected).abs().max() > 0.05
    torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)
