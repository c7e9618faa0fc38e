"""Adapter files of Stable Diffusion 1.x name 72 layers of the text encoder and 192 of the U-Net."""

import re

import pytest
from torch import nn

from library.architectures.sd.layers import view
from library.models.clip.clip import empty_clip
from library.models.unet.unet import empty_unet
from networks.core.targets.targets import TargetModule, find_target_modules
from tests.contracts.test_base_keys import parts


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """Return the full-size model as network modules see it, on the meta device."""
    components = parts()
    clip, unet = empty_clip(components["text_encoder"].config), empty_unet(components["unet"].config)
    text_view, unet_view = view([clip], unet)
    assert isinstance(text_view, nn.Module)
    return text_view, unet_view


def sites_of(
    models: tuple[nn.Module, nn.Module], with_conv: bool = False
) -> tuple[list[TargetModule], list[TargetModule]]:
    text_view, unet = models
    targets = unet.adapter_targets
    (text,) = targets.text_encoders
    classes = targets.denoiser.blocks + (targets.denoiser.conv_blocks if with_conv else ())
    return find_target_modules(text, text_view, text.blocks), find_target_modules(targets.denoiser, unet, classes)


def test_every_unet_layer_belongs_to_one_of_the_25_blocks(models):
    block_list = models[1].adapter_targets.block_list
    assert (len(block_list.patterns), block_list.down, block_list.mid, block_list.up) == (25, 12, 1, 12)
    counts = [0] * 25
    for site in sites_of(models, with_conv=True)[1]:
        matches = [i for i, p in enumerate(block_list.patterns) if p and re.search(p, site.path)]
        assert len(matches) == 1, site.path
        counts[matches[0]] += 1
    down, up = [15, 15, 1, 16, 15, 1, 16, 15, 1, 3, 3], [4, 4, 5, 16, 16, 17, 16, 16, 17, 16, 16, 16]
    assert counts == [0, *down, 18, *up]


def test_the_view_shares_its_layers_with_the_model(models):
    text_view, _ = models
    layer = text_view.text_model.encoder.layers[3].mlp.fc1
    assert dict(text_view.named_modules())["text_model.encoder.layers.3.mlp.fc1"] is layer
