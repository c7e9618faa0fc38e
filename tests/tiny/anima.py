"""A tiny but complete Anima model."""

from typing import Any

import torch
from torch import Tensor

from library.architectures.anima.keys import diffusers_key
from library.architectures.anima.llm_adapter import AdapterConfig
from library.architectures.anima.model import Anima, AnimaConfig
from tests.tiny.init import fixed_init

QWEN_WIDTH = 40
NUM_T5_WORDS = 24

CONFIG = AnimaConfig(
    channels=16,
    width=48,
    head_width=24,
    mlp_width=192,
    text_width=32,
    modulation_rank=8,
    num_blocks=2,
    adapter=AdapterConfig(
        num_words=NUM_T5_WORDS, width=32, source_width=QWEN_WIDTH, head_width=8, mlp_width=128, num_blocks=2
    ),
)


def tiny_anima(seed: int, num_words: int = NUM_T5_WORDS) -> Anima:
    """The denoiser alone, its weights random."""
    from dataclasses import replace

    config = replace(CONFIG, adapter=replace(CONFIG.adapter, num_words=num_words))
    with torch.device("meta"):
        model = Anima(config)
    model.load_state_dict(fixed_init(model, seed), assign=True)
    return model.requires_grad_(False).eval()


def diffusers_state(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of the denoiser under the names of diffusers' two models, by the names of these."""
    found: dict[str, dict[str, Tensor]] = {"transformer": {}, "text_conditioner": {}}
    for key, tensor in state.items():
        if key.startswith("llm_adapter."):
            found["text_conditioner"][key.removeprefix("llm_adapter.")] = tensor
        else:
            found["transformer"][diffusers_key(key).removeprefix("transformer.")] = tensor
    return found


def transformer_config(config: AnimaConfig = CONFIG) -> dict[str, Any]:
    """Arguments of diffusers' CosmosTransformer3DModel, which is given the mask of padding as a channel."""
    return {
        "in_channels": config.channels + 1,
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


def conditioner_config(config: AdapterConfig = CONFIG.adapter) -> dict[str, Any]:
    """Arguments of diffusers' AnimaTextConditioner."""
    return {
        "source_dim": config.source_width,
        "target_dim": config.width,
        "model_dim": config.width,
        "num_layers": config.num_blocks,
        "num_attention_heads": config.width // config.head_width,
        "mlp_ratio": config.mlp_width / config.width,
        "target_vocab_size": config.num_words,
    }
