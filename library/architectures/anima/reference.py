"""Comparison of Anima's denoiser with diffusers' two classes on the same weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.anima.layers import diffusers_path
from library.architectures.anima.llm_adapter import EPS, AdapterConfig
from library.architectures.anima.model import MASK_CHANNELS, Anima, AnimaConfig, with_mask
from library.models.reference import diffusers_class, random_inputs, shorten_model, with_weights


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compare with the whole text adapter."""
    assert isinstance(denoiser, Anima)
    ours = shorten_model(denoiser, {"blocks": "num_blocks"})
    adapter = ours.config.adapter
    latents_BCHW, sigmas_B, source_BSE, mask_BS = random_inputs(generator, ours.config.channels, adapter.source_width)
    ids_BL = torch.randint(adapter.num_words, mask_BS.shape, generator=generator)
    found_BCHW: Tensor = ours(latents_BCHW, sigmas_B, source_BSE, mask_BS, ids_BL, mask_BS)
    transformer, conditioner = diffusers_models(ours)
    text_BLE = conditioner(source_BSE, ids_BL, target_attention_mask=mask_BS, source_attention_mask=mask_BS)
    # The padding mask is passed as a channel: the class itself needs torchvision to append it.
    expected_BCHW: Tensor = transformer(
        hidden_states=with_mask(latents_BCHW)[:, :, None], timestep=sigmas_B, encoder_hidden_states=text_BLE
    ).sample[:, :, 0]
    return found_BCHW, expected_BCHW


def diffusers_models(denoiser: Anima) -> tuple[Any, Any]:
    """Build diffusers' transformer and text adapter with the weights of `denoiser`."""
    c, state = denoiser.config, diffusers_state(denoiser.state_dict())
    models = diffusers_class("CosmosTransformer3DModel"), diffusers_class("AnimaTextConditioner")
    transformer = with_weights(models[0](**transformer_config(c)), state["transformer"])
    for block in transformer.transformer_blocks:
        for attention in (block.attn1, block.attn2):  # NVIDIA's code uses 1e-6 here, diffusers 1e-5
            attention.norm_q.eps = attention.norm_k.eps = EPS
    return transformer, with_weights(models[1](**conditioner_config(c.adapter)), state["text_conditioner"])


def transformer_config(config: AnimaConfig) -> dict[str, Any]:
    return {
        "in_channels": config.channels + MASK_CHANNELS,
        "out_channels": config.channels,
        "num_attention_heads": config.width // config.head_width,
        "attention_head_dim": config.head_width,
        "num_layers": config.num_blocks,
        "mlp_ratio": config.mlp_width / config.width,
        "text_embed_dim": config.text_width,
        "adaln_lora_dim": config.modulation_rank,
        "rope_scale": (1.0, 4.0, 4.0),
        "concat_padding_mask": False,
        "extra_pos_embed_type": None,
    }


def conditioner_config(config: AdapterConfig) -> dict[str, Any]:
    return {
        "source_dim": config.source_width,
        "target_dim": config.width,
        "model_dim": config.width,
        "num_layers": config.num_blocks,
        "num_attention_heads": config.width // config.head_width,
        "mlp_ratio": config.mlp_width / config.width,
        "target_vocab_size": config.num_words,
    }


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights under diffusers' names, grouped by its two models."""
    states: dict[str, dict[str, Tensor]] = {"transformer": {}, "text_conditioner": {}}
    for key, tensor in state.items():
        model, _, name = diffusers_key(key).partition(".")
        states[model][name] = tensor
    return states


def diffusers_key(key: str) -> str:
    """Return diffusers' name of a weight, which begins with the name of the model."""
    path, _, leaf = key.rpartition(".")
    return f"{diffusers_path(path)}.{leaf}"
