"""The language model of Qwen3-VL as a text encoder (transformers' Qwen3VLTextModel), from a file or a folder.

It has Qwen3's names, sizes and tokenizer (`load_qwen3_tokenizer`), but another rotary base. A Qwen3-VL file also
contains a vision model, which is not part of this encoder.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from library.base.errors import about
from library.checkpoints.weights import Weights, configure, list_first_names
from library.models.language_models import (
    FLAG,
    PREFIXES,
    LanguageModel,
    decoder_config,
    extract_decoder,
    remove_last_norm,
    with_first_layers,
)
from library.models.loading import Component, MaybeComponent, empty_transformers_model, load_component
from library.models.qwen3 import BEGIN, END, EPS, MARK, Qwen3Release, load_qwen3_tokenizer
from library.models.shapes import Shapes, shape_of

logger = logging.getLogger(__name__)

ROPE_BASE = 5_000_000.0
VISION = "visual."
KIND = "qwen3_vl"  # model_type in its folder's config.json


def qwen3_vl_component(weights: Weights, folder_config: Mapping[str, Any] | None, release: Qwen3Release) -> Component:
    """Build the encoder's component from shapes; `folder_config` is None for a file.

    Raises UserError if the weights are something else. Warns of a file that may hold Qwen3, which has the same names
    and sizes.
    """
    model_type = str((folder_config or {}).get("model_type", KIND))
    decoder = extract_decoder(weights, (release.prefix, *PREFIXES)) if model_type.startswith(KIND) else None
    if decoder is None or MARK not in decoder.shapes:
        reason = (
            f"{model_type}'s" if decoder is None and model_type != KIND else f"first names: {list_first_names(weights)}"
        )
        raise about(release.flag, weights.origin)(
            f"is not a Qwen3-VL text encoder ({reason})", f"use {release.hub_name}"
        )
    if folder_config is None and not any(VISION in name for name in weights.shapes):
        logger.warning(
            "%s %s has no vision model. If it is Qwen3, which has the same sizes, it encodes captions wrongly; then "
            "use %s",
            release.flag,
            weights.origin,
            release.hub_name,
        )
    return Component(configure(decoder, qwen3_vl_config), decoder)


def qwen3_vl_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of transformers' Qwen3VLTextConfig."""
    head_width = shape_of(shapes, MARK)[0]
    # Qwen3-VL divides the 64 frequencies of its heads into 24, 20 and 20; tiny models keep the shares.
    section = head_width // 2 * 5 // 16  # the frequencies for rows, and for columns; the others are for time
    config = decoder_config(shapes, head_width, ROPE_BASE, EPS)
    return {
        **config,
        "rope_scaling": {"rope_type": "default", "mrope_section": [head_width // 2 - 2 * section, section, section]},
    }


empty_qwen3_vl = partial(empty_transformers_model, "qwen3_vl", "Qwen3VLText")


def load_qwen3_vl(component: MaybeComponent, dtype: torch.dtype) -> nn.Module:
    """Load the encoder in `dtype`, frozen, on the CPU. It has no last norm: its last states are the last layer's."""
    return remove_last_norm(load_component(empty_qwen3_vl, component, dtype))


def qwen3_vl_encoder(size: str, num_layers: int | None = None) -> LanguageModel:
    """Return the Qwen3-VL of this size ("4B"), or its first layers, as a base model's encoder."""
    prefix = f"text_encoders.qwen3vl_{size.lower()}.transformer.model."
    release = Qwen3Release(FLAG, f"Qwen/Qwen3-VL-{size}-Instruct", prefix)

    def open_it(config: Mapping[str, Any] | None, weights: Weights) -> Component:
        component = qwen3_vl_component(weights, config, release)
        return component if num_layers is None else with_first_layers(component, num_layers, FLAG)

    return LanguageModel(
        name="Qwen3-VL",
        hub_name=release.hub_name,
        prefix=prefix,
        marks=(BEGIN, END),
        open=open_it,
        load=load_qwen3_vl,
        load_tokenizer=partial(load_qwen3_tokenizer, release),
    )
