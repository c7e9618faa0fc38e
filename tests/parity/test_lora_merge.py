"""Gradients of adapters in a U-Net whose blocks are recomputed."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.architectures.sd.layers import view
from library.memory.blocks import recompute
from library.models.unet.unet import run_unet_blocks_with
from networks.lora import create_network
from tests.tiny.init import fixed_init
from tests.tiny.sd import CLIP, UNET
from tests.tolerances import FLOAT64


def tiny_unet(seed: int, dtype: torch.dtype) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**UNET)
    unet.load_state_dict(fixed_init(unet, seed))
    return unet.to(dtype).requires_grad_(False).eval()


def tiny_clip(seed: int, dtype: torch.dtype) -> CLIPTextModel:
    clip = CLIPTextModel(CLIPTextConfig(**CLIP, vocab_size=99))
    clip.load_state_dict(fixed_init(clip, seed))
    return clip.to(dtype).requires_grad_(False).eval()


EVERY_FORM = {"conv_dim": "3", "use_tucker": "1", "use_scalar": "1", "train_norm": "1", "dora_wd": "1"}


@pytest.mark.parametrize("form", [{}, EVERY_FORM], ids=["plain", "every form"])
def test_gradient_checkpointing_with_dropout_keeps_the_gradients(form: dict[str, str]) -> None:
    unet, clip = tiny_unet(421, torch.float64), tiny_clip(422, torch.float64)
    network = create_network(
        1.0, 4, 2.0, None, *view([clip], unet), neuron_dropout=0.2, rank_dropout="0.2", module_dropout="0.2",
        **form,
    ).double()  # fmt: skip
    generator = torch.Generator().manual_seed(423)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    network.apply_to(*view([clip], unet), train_text_encoder=False)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    text = torch.randn(2, 7, 32, dtype=torch.float64)

    def gradients() -> list[torch.Tensor | None]:
        network.zero_grad()
        torch.manual_seed(424)
        unet(x, torch.tensor([17, 801]), text).sample.square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    plain = gradients()
    run_unet_blocks_with(unet, recompute)
    again = gradients()
    assert sum(g is None for g in plain) == sum(g is None for g in again) > 0  # modules skipped by module dropout
    for one, other in zip(plain, again, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, **FLOAT64)
