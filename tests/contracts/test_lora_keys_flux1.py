"""Keys and shapes of FLUX.1 adapter files, which other programs rely on, at full size."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
from torch import nn

from library.architectures.flux.layers import view
from library.architectures.flux.model import Flux, FluxConfig
from library.models.clip.clip import empty_clip
from library.models.loading import build_on_meta_device
from library.models.t5 import empty_t5
from networks.lora_flux import create_network
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import saved_shapes

pytestmark = pytest.mark.slow

shapes_of = partial(saved_shapes, create_network)

FACTS: Mapping[str, Any] = facts("lora_keys_flux1")
DEV = FluxConfig(64, 3072, 128, 12288, 4096, 19, 38, has_guidance=True, pooled_width=768)
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
Models = tuple[list[nn.Module], nn.Module]


def full_size(config: FluxConfig) -> Models:
    """Return text encoders and denoiser as network modules see them, without weights."""
    return view([empty_clip(CLIP_L), empty_t5(T5_XXL)], build_on_meta_device(Flux, config))


@cache
def full_size_models() -> Models:
    return full_size(DEV)


def test_schnell_has_no_guidance_embedder_to_adapt() -> None:
    schnell = full_size(replace(DEV, has_guidance=False))
    assert shapes_of(schnell) == FACTS["default"]
    variant = FACTS["schnell_in_dims"]
    assert shapes_of(schnell, **variant["network_args"]) == {**FACTS["default"], **variant["added"]}
