"""A tiny Qwen3-VL of transformers, with its vision model and random weights."""

from typing import Any

from tests.tiny.init import fixed_init

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [4, 2, 2]},
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0, 1],
}


def tiny_qwen3_vl(seed: int, num_words: int, **sizes: Any) -> Any:
    """Return transformers' Qwen3VLModel; `sizes` override those of its language model."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {**TEXT, **sizes, "vocab_size": num_words}
    config = Qwen3VLConfig(text_config=text, vision_config={**VISION, "out_hidden_size": text["hidden_size"]})
    model = Qwen3VLModel(config).eval().requires_grad_(False)
    model.load_state_dict(fixed_init(model, seed))
    return model
