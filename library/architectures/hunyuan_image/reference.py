"""Comparison of HunyuanImage 2.1's denoiser with diffusers' class on the same weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.hunyuan_image.layers import KEYS, to_original
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig
from library.models.double_stream import SWAPPED
from library.models.reference import build_theirs, random_inputs, shorten_model, split_weights, stream_arguments


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    assert isinstance(denoiser, HunyuanImage)
    ours = shorten_model(denoiser, {"double_blocks": "num_double", "single_blocks": "num_single"})
    latents_BCHW, sigmas_B, text_BLE, mask_BL = random_inputs(
        generator, ours.config.in_features, ours.config.text_width
    )
    glyphs_BGE = torch.randn(2, 5, ours.config.glyph_width, generator=generator)
    # A sample without quotes has no glyph token to attend to.
    glyph_mask_BG = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    timesteps_B = 1000 * sigmas_B
    found_BCHW: Tensor = ours(latents_BCHW, timesteps_B, text_BLE, mask_BL, glyphs_BGE, glyph_mask_BG)
    expected_BCHW: Tensor = diffusers_model(ours)(
        latents_BCHW,
        timesteps_B,
        encoder_hidden_states=text_BLE,
        encoder_attention_mask=mask_BL,
        encoder_hidden_states_2=glyphs_BGE,
        encoder_attention_mask_2=glyph_mask_BG,
    ).sample
    return found_BCHW, expected_BCHW


def diffusers_config(config: HunyuanImageConfig) -> dict[str, Any]:
    # Its MLPs are all four times as wide as the model.
    return {
        **stream_arguments(config),
        "out_channels": config.in_features,
        "num_refiner_layers": config.num_refiners,
        "text_embed_dim": config.text_width,
        "text_embed_2_dim": config.glyph_width,
        "rope_axes_dim": [config.head_width // 2, config.head_width // 2],
        "guidance_embeds": False,
        "use_meanflow": False,
    }


def diffusers_state(state: Mapping[str, Tensor], config: HunyuanImageConfig) -> dict[str, Tensor]:
    weights = split_weights(state, lambda key: KEYS.source_keys(to_original(key)), [config.width] * 3, SWAPPED)
    input_key = "x_embedder.proj.weight"  # diffusers' first layer is a convolution
    return {**weights, input_key: weights[input_key][:, :, None, None]}


diffusers_model = partial(build_theirs, "HunyuanImageTransformer2DModel", diffusers_config, diffusers_state)
