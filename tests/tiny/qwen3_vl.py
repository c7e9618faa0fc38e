"""A tiny Qwen3-VL of transformers, with its vision model and random weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from library.models.qwen3_vl_vision import NUM_HEADS
from tests.tiny.init import fixed_init
from tests.tiny.zimage import SPECIAL

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


MARKS = (*SPECIAL, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def deep_vision(depth: int, deepstack: Sequence[int]) -> dict[str, Any]:
    """Return the sizes of a vision model with the heads and the depth of a published one."""
    wide = {"hidden_size": 4 * NUM_HEADS, "intermediate_size": 32, "num_heads": NUM_HEADS}
    return {**VISION, **wide, "depth": depth, "deepstack_visual_indexes": list(deepstack)}


def tiny_qwen3_vl(seed: int, num_words: int, vision: Mapping[str, Any] = VISION, **sizes: Any) -> Any:
    """Return transformers' Qwen3VLModel, whose image tokens are those of a tokenizer that ends in `MARKS`; `sizes`
    override those of its language model."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {**TEXT, **sizes, "vocab_size": num_words}
    ids = {f"{kind}_token_id": num_words - place for place, kind in ((2, "image"), (1, "video"))}
    ids |= {f"vision_{kind}_token_id": num_words - place for place, kind in ((4, "start"), (3, "end"))}
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": text["hidden_size"]}, **ids)
    model = Qwen3VLModel(config).eval().requires_grad_(False)
    model.load_state_dict(fixed_init(model, seed))
    return model
