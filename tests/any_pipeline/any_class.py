"""Builds a tiny random pipeline of any class of diffusers: all numbers of its models are shrunk by one rule.

What the rule cannot know, such as the widths of several text encoders side by side, stands in RELATIONS.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn

from tests.tiny.language_model_pipelines import mistral_3, qwen_3_vl
from tests.tiny.pipeline_parts import BETAS, SIZES, WIDTH, clip, flow, language_model, qwen_2_5_vl, t5, tokenizer, umt5

HEAD_DIM = 16
NUM_HEADS = 2
CHANNELS = 4  # of latents
SHRUNK: Sequence[tuple[str, Callable[[int], int]]] = (
    (r"(^|_)(num|n)_.*(layers|blocks)$|^num_layers$|^depth$|^layers_per_block$|_layers$", lambda old: min(old, 2)),
    (r"(num|n)_(attention_|cross_attention_|key_value_|kv_)?heads$", lambda old: NUM_HEADS),
    (r"(^|_)head_dim$", lambda old: HEAD_DIM),
    (r"^(in|out|in_visual|out_visual|latent)_(channels|dim)$|^z_dim$", lambda old: shrink_channels(old)),
    (r"ff(n)?_dim$|intermediate_size$|ffn_hidden_size$|intermediate_dim$", lambda old: 48),
    (r"_dim$|^dim$|hidden_size|_channels$|^base_dim$|_projection_dim$", lambda old: min(old, WIDTH)),
)
"""(part of a parameter's name, what its number becomes), the first that matches."""
LEVELS: Mapping[str, Any] = {
    "block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
RELATIONS: Mapping[str, Mapping[str, Any]] = {
    "SD3Transformer2DModel": {
        "joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH, "caption_projection_dim": 32,
        "attention_head_dim": HEAD_DIM,
    },
    "WanTransformer3DModel": {"attention_head_dim": 12, "freq_dim": 32},
    "SkyReelsV2Transformer3DModel": {"attention_head_dim": 12, "freq_dim": 32},
    "QwenImageTransformer2DModel": {"joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
    "UNet2DConditionModel": {
        "attention_head_dim": 2, "cross_attention_dim": WIDTH, "layers_per_block": 1, "sample_size": 8,
    },
    "MotionAdapter": {
        "motion_layers_per_block": 1, "block_out_channels": (8,) * 4, "motion_norm_num_groups": 1,
        "motion_num_attention_heads": 2,
    },
    "UNet3DConditionModel": {
        "attention_head_dim": 4, "cross_attention_dim": WIDTH, "layers_per_block": 1, "sample_size": 8,
    },
    "HunyuanVideo15Transformer3DModel": {
        "in_channels": 2 * 32 + 1, "out_channels": 32, "text_embed_dim": 16, "text_embed_2_dim": WIDTH,
        "image_embed_dim": 16, "rope_axes_dim": (4, 6, 6), "task_type": "t2v",
    },
    "AutoencoderKLHunyuanVideo15": {"latent_channels": 32, "block_out_channels": (32, 32, 64, 64, 64)},
    "Kandinsky5Transformer3DModel": {
        "in_text_dim": 16, "in_text_dim2": WIDTH, "time_dim": 16, "model_dim": 32, "ff_dim": 48, "axes_dims": (8, 4, 4),
        "in_visual_dim": 4, "out_visual_dim": 4, "num_text_blocks": 1, "num_visual_blocks": 2,
    },
    "EasyAnimateTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "time_embed_dim": 16, "text_embed_dim": WIDTH,
    },
    "LatteTransformer3DModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_attention_heads": 2,
        "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": WIDTH, "video_length": 1,
        "num_layers": 2, "attention_bias": True, "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "activation_fn": "gelu-approximate",
    },
    "AutoencoderKLMochi": {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
    "AutoencoderKL": {"shift_factor": 0.1159, "layers_per_block": 1, **LEVELS},
    "FluxTransformer2DModel": {"pooled_projection_dim": WIDTH, "guidance_embeds": True, "in_channels": 16},
    "UNet2DConditionModel of SDXL|StableDiffusionXL": {
        "cross_attention_dim": 2 * WIDTH, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    },
}  # fmt: skip
ENCODERS: Mapping[str, Callable[[], nn.Module]] = {
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": lambda: clip(True),
    "T5EncoderModel": t5,
    "UMT5EncoderModel": umt5,
    "Qwen2_5_VLForConditionalGeneration": qwen_2_5_vl,
    "Qwen2_5_VLTextModel": lambda: qwen_2_5_vl().model.language_model,
    "Qwen3VLForConditionalGeneration": lambda: qwen_3_vl(36),
    "Qwen3VLModel": lambda: qwen_3_vl(36, "Model"),
    "Mistral3ForConditionalGeneration": lambda: mistral_3(31),
    "Gemma2PreTrainedModel": lambda: language_model("Gemma2", sliding_window=16),
    "Gemma2Model": lambda: language_model("Gemma2", sliding_window=16),
    "LlamaModel": lambda: language_model("Llama"),
    "Qwen3Model": lambda: language_model("Qwen3"),
    "Qwen3ForCausalLM": lambda: language_model("Qwen3"),
    "PreTrainedModel": lambda: language_model("Qwen3"),
    "GlmModel": lambda: language_model("Glm", pad_token_id=0),
    "BertModel": lambda: bert(),
}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "watermarker", "image_processor")


class NotBuilt(Exception):
    """A class for which the builder has no model or no relation yet."""


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=512))


def shrink_channels(old: int) -> int:
    """Return a quarter of latent channels, packed or not; few are kept."""
    return old // 4 if old >= 16 else old


def shrink_value(name: str, old: Any) -> Any:
    if isinstance(old, bool):
        return old
    if isinstance(old, int):
        return next((rule(old) for pattern, rule in SHRUNK if re.search(pattern, name)), old)
    if isinstance(old, tuple | list) and old and all(isinstance(one, int) for one in old):
        if re.search(r"axes_dim|rope_axes|mrope", name):
            return shrink_axes(old)
        if re.search(r"block_out_channels|channels$", name):
            return type(old)([8] * len(old))
        if re.search(r"layers_per_block|num_layers", name):
            return type(old)([min(one, 1) for one in old])
    return old


def shrink_axes(old: Any) -> Any:
    """Return even parts of a head, as many as before."""
    even = [max(2, HEAD_DIM * one // sum(old) // 2 * 2) for one in old]
    even[0] += HEAD_DIM - sum(even)
    return type(old)(even)


def relations_of(model: str, pipeline: str) -> dict[str, Any]:
    """Return what RELATIONS has for a model, and for it in a pipeline whose name begins or ends as written there."""
    own = [values for key, values in RELATIONS.items() if key == model]
    inside = [
        values
        for key, values in RELATIONS.items()
        if key.startswith(f"{model} of ") and re.search(key.partition(" of ")[2], pipeline)
    ]
    return {name: value for values in own + inside for name, value in values.items()}


def shrink(kind: type[Any], pipeline: str) -> nn.Module:
    """Build a model of diffusers with small numbers."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    given = {p.name: shrink_value(p.name, p.default) for p in parameters if p.default is not p.empty}
    width = next((given[name] for name in ("z_dim", "latent_channels") if name in given), CHANNELS)
    for name in ("latents_mean", "latents_std"):
        if isinstance(given.get(name), list | tuple):
            given[name] = type(given[name])(given[name][:width])
    if "norm_num_groups" in given and given["norm_num_groups"] is not None:
        given["norm_num_groups"] = 1  # groups of two values would round gradients coarsely
    model: nn.Module = kind(**{**given, **relations_of(kind.__name__, pipeline)})
    return model


def list_types(annotation: Any) -> list[type[Any]]:
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in list_types(part)]
    return [annotation] if isinstance(annotation, type) and annotation is not type(None) else []


def build_part(name: str, kinds: Sequence[type[Any]], is_clip: bool, pipeline: str) -> Any:
    from diffusers import ModelMixin, SchedulerMixin

    if name.startswith(("tokenizer", "processor", "text_processor")):
        return tokenizer(77) if is_clip else tokenizer(512)
    if name == "scheduler":
        kind = kinds[0] if kinds else None
        if kind is None or kind.__name__ in ("KarrasDiffusionSchedulers", "SchedulerMixin"):
            from diffusers import DDIMScheduler

            return DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
        assert issubclass(kind, SchedulerMixin)
        return flow(shift=3.0) if kind.__name__ == "FlowMatchEulerDiscreteScheduler" else kind()
    if name == "guider":
        return kinds[0]()
    for kind in kinds:
        if kind.__name__ in ENCODERS:
            return ENCODERS[kind.__name__]()
        if issubclass(kind, ModelMixin):
            return shrink(kind, pipeline)
    raise NotBuilt(f"{name}: {', '.join(kind.__name__ for kind in kinds) or 'unknown'}")


def build_parts(kind: type[Any]) -> dict[str, Any]:
    """Build all components of a pipeline. Raises NotBuilt, or anything that a model raises for shrunk numbers."""
    hints, parts = get_type_hints(kind.__init__), {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        kinds = list_types(hints.get(name))
        if name in LEFT_OUT:
            parts[name] = None
        elif parameter.default is not parameter.empty and not name.startswith(("vae", "transformer", "scheduler")):
            continue  # an optional part or a setting
        elif name == "transformer_2":
            parts[name] = None
        else:
            number = name.removeprefix("tokenizer")
            encoder = list_types(hints.get(f"text_encoder{number}"))
            parts[name] = build_part(name, kinds, any("CLIP" in one.__name__ for one in encoder), kind.__name__)
    return parts
