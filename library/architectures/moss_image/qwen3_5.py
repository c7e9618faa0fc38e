"""The text encoder Qwen3.5 (transformers' Qwen3_5TextModel and Qwen3_5VisionModel), from a file or a folder, and its
tokenizer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from library.base.errors import about, error_in
from library.checkpoints.weights import Weights, configure, list_first_names
from library.models.language_models import FLAG, WORDS, LanguageModel, extract_decoder
from library.models.loading import Component, empty_transformers_model, load_component
from library.models.qwen3 import BEGIN, END
from library.models.qwen3_vl_vision import VISION_MARKS, vision_component
from library.models.qwen3_vl_vision import encode_with_images as encode_deepstack
from library.models.shapes import Shapes, count, shape_of
from library.models.tokenizer_files import TokenizerFiles

HUB_NAME = "Qwen/Qwen3.5-9B"
LINEAR, FULL = "linear_attn.in_proj_qkv.weight", "self_attn.q_norm.weight"  # of a layer's two kinds of attention
ROPE_BASE = 10_000_000.0
ROTARY_SHARE = 0.25  # of a head's values that rotate
EPS = 1e-6
FILES = TokenizerFiles(
    HUB_NAME,
    ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    lambda folder: (folder / "tokenizer.json").is_file(),
    "Qwen3.5",
    "tokenizer.json and chat_template.jinja",
    "PreTrainedTokenizerFast",
)


def language_component(weights: Weights) -> Component:
    """Build the language model's component from shapes, under any prefix. Raises UserError for something else."""
    mark = f"layers.0.{LINEAR}"
    prefix = next((name.removesuffix(mark) for name in weights.shapes if name.endswith(mark)), None)
    decoder = None if prefix is None else extract_decoder(weights, (prefix,))
    if decoder is None:
        first = list_first_names(weights)
        raise about(FLAG, weights.origin)(f"is not a Qwen3.5 text encoder (first names: {first})", f"use {HUB_NAME}")
    return Component(configure(decoder, language_config), decoder)


def language_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of transformers' Qwen3_5TextConfig."""
    vocab, width = shape_of(shapes, WORDS)
    layers = range(count(shapes, r"layers\.(\d+)\."))
    is_full = [f"layers.{n}.{FULL}" in shapes for n in layers]
    full, linear = f"layers.{is_full.index(True) if any(is_full) else 0}.self_attn", "layers.0.linear_attn"
    (head_width,) = shape_of(shapes, f"{full}.q_norm.weight")
    (value_width,) = shape_of(shapes, f"{linear}.norm.weight")
    (num_values,) = shape_of(shapes, f"{linear}.A_log")
    num_features, _, kernel = shape_of(shapes, f"{linear}.conv1d.weight")
    num_frequencies = int(head_width * ROTARY_SHARE) // 2
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": len(layers),
        # Queries come with a gate for each of their outputs.
        "num_attention_heads": shape_of(shapes, f"{full}.q_proj.weight")[0] // (2 * head_width),
        "num_key_value_heads": shape_of(shapes, f"{full}.k_proj.weight")[0] // head_width,
        "head_dim": head_width,
        "layer_types": ["full_attention" if full else "linear_attention" for full in is_full],
        "linear_conv_kernel_dim": kernel,
        "linear_key_head_dim": value_width,  # as wide as values in every release
        "linear_value_head_dim": value_width,
        "linear_num_key_heads": (num_features // value_width - num_values) // 2,
        "linear_num_value_heads": num_values,
        "rms_norm_eps": EPS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ROPE_BASE,
            "partial_rotary_factor": ROTARY_SHARE,
            "mrope_interleaved": True,
            # Frequencies of time, row and column in turn: 11, 11 and 10 of the 32.
            "mrope_section": [(num_frequencies + 2 - axis) // 3 for axis in range(3)],
        },
    }


def image_component(weights: Weights) -> Component | None:
    """Build the vision model's component from a text encoder's file; None if the file has no vision model."""
    component = vision_component(weights)
    if component is None:
        return None
    # Unlike Qwen3-VL's, it gives the language model nothing but its last states.
    config = {name: value for name, value in component.config.items() if name != "deepstack_visual_indexes"}
    return Component(config, component.weights)


load_language = partial(load_component, partial(empty_transformers_model, "qwen3_5", "Qwen3_5Text"))
load_vision = partial(load_component, partial(empty_transformers_model, "qwen3_5", "Qwen3_5Vision"))
encode_with_images = partial(encode_deepstack, has_deepstack=False)


def load_tokenizer(folders: Sequence[Path], cache_dir: str | None, num_words: int | None) -> Any:
    """Load Qwen3.5's tokenizer, as described at `TokenizerFiles.load`. Raises UserError if it has no chat template."""
    tokenizer = FILES.load(folders, cache_dir, num_words)
    if not tokenizer.chat_template:
        raise error_in(path=tokenizer.name_or_path)(
            f"the tokenizer {tokenizer.name_or_path} has no chat template",
            f"put chat_template.jinja of {HUB_NAME} next to its tokenizer.json",
        )
    return tokenizer


ENCODER = LanguageModel(
    name="Qwen3.5",
    hub_name=HUB_NAME,
    prefix="text_encoders.",
    marks=(BEGIN, END, *VISION_MARKS),
    open=lambda config, weights: language_component(weights),
    load=load_language,
    load_tokenizer=load_tokenizer,
    vision=(image_component, load_vision),
)
