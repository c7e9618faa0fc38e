"""A model with the adapter installed computes the same as diffusers' model with merged weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from library.architectures.sd.targets import view
from library.memory.blocks import recompute
from library.models.unet.unet import run_unet_blocks_with
from networks.core.network.network import AdapterNetwork
from networks.lora import create_network
from tests.tiny.init import fixed_init
from tests.tiny.sd import CLIP, UNET
from tests.tolerances import FLOAT32_DEEP, FLOAT64

TOLERANCE = {torch.float32: FLOAT32_DEEP, torch.float64: FLOAT64}


def tiny_unet(seed: int, dtype: torch.dtype) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**UNET)
    unet.load_state_dict(fixed_init(unet, seed))
    return unet.to(dtype).requires_grad_(False).eval()


def tiny_clip(seed: int, dtype: torch.dtype) -> CLIPTextModel:
    clip = CLIPTextModel(CLIPTextConfig(**CLIP, vocab_size=99))
    clip.load_state_dict(fixed_init(clip, seed))
    return clip.to(dtype).requires_grad_(False).eval()


def trained_network(clip: nn.Module, unet: nn.Module, seed: int, dtype: torch.dtype) -> AdapterNetwork:
    network = create_network(0.8, 4, 2.0, None, *view([clip], unet), conv_dim="3", conv_alpha="2")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network.to(dtype)


def add_changes(model: nn.Module, network: AdapterNetwork, prefix: str, strip: str = "") -> int:
    """Merge W + 0.8 * alpha / rank * up @ down into a model by the file's names; return the number of modules."""
    state = network.state_dict()
    num_changed = 0
    for path, module in model.named_modules():
        key = f"{prefix}.{strip}{path}".replace(".", "_")
        if f"{key}.alpha" not in state:
            continue
        down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
        change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)) * 0.8 * state[f"{key}.alpha"] / down.shape[0]
        module.weight.data += change.view_as(module.weight)
        num_changed += 1
    return num_changed


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_adapted_unet_matches_the_merged_one(dtype: torch.dtype) -> None:
    unet, plain, clip = tiny_unet(401, dtype), tiny_unet(401, dtype), tiny_clip(402, dtype)
    network = trained_network(clip, unet, 403, dtype)
    num_changed = add_changes(plain, network, "lora_unet")
    assert num_changed == sum(key.startswith("lora_unet") for key in network.adapters)
    torch.manual_seed(404)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    steps, text = torch.tensor([17, 801]), torch.randn(2, 7, 32, dtype=dtype)
    alone = unet(x, steps, text).sample
    network.apply_to(*view([clip], unet))
    with_adapter = unet(x, steps, text).sample
    torch.testing.assert_close(with_adapter, plain(x, steps, text).sample, **TOLERANCE[dtype])
    assert (with_adapter - alone).abs().mean() > 0.1 * alone.abs().mean()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_adapted_text_encoder_matches_the_merged_one(dtype: torch.dtype) -> None:
    clip, plain, unet = tiny_clip(411, dtype), tiny_clip(411, dtype), tiny_unet(412, dtype)
    network = trained_network(clip, unet, 413, dtype)
    num_changed = add_changes(plain, network, "lora_te", strip="text_model.")
    assert num_changed == sum(key.startswith("lora_te") for key in network.adapters) == 12
    ids = torch.randint(0, 99, (2, 77), generator=torch.Generator().manual_seed(414))
    alone = clip(ids).last_hidden_state
    network.apply_to(*view([clip], unet))
    with_adapter = clip(ids).last_hidden_state
    torch.testing.assert_close(with_adapter, plain(ids).last_hidden_state, **TOLERANCE[dtype])
    assert (with_adapter - alone).abs().mean() > 0.1 * alone.abs().mean()


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
