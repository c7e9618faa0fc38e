"""Keys and shapes of FLUX.1 adapter files, which other programs rely on, at full size."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
from torch import nn

from library.architectures.flux.model import Flux, FluxConfig
from library.architectures.flux.targets import view
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


@pytest.fixture(scope="module")
def models() -> Models:
    return full_size_models()


def test_schnell_has_no_guidance_embedder_to_adapt() -> None:
    schnell = full_size(replace(DEV, has_guidance=False))
    assert shapes_of(schnell) == FACTS["default"]
    variant = FACTS["schnell_in_dims"]
    assert shapes_of(schnell, **variant["network_args"]) == {**FACTS["default"], **variant["added"]}


def test_split_double_blocks_are_saved_as_plain_lora_of_three_times_the_rank(models: Models) -> None:
    """sd-scripts cannot build this variant; the shapes follow from variants that it can."""
    single = FACTS["variants"]["split_qkv=True train_blocks=single"]["changed"]
    expected = {**FACTS["default"], **single}
    for key, shape in FACTS["default"].items():
        if "attn_qkv.lora_down" in key:
            expected[key] = [12, shape[1]]
        elif "attn_qkv.lora_up" in key:
            expected[key] = [shape[0], 12]
    assert shapes_of(models, split_qkv="true") == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"in_dims": "[4,4,4,4]"},
            "in_dims has 4 entries; it needs 5: img_in, time_in, vector_in, guidance_in, txt_in",
        ),
        ({"train_double_block_indices": "19"}, "names block 19, but the base model has 19 of them: 0 to 18"),
        ({"train_single_block_indices": "0-38"}, "names block 38, but the base model has 38 of them"),
    ],
)
def test_targets_that_flux_lacks_raise_errors(models: Models, args: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        shapes_of(models, **args)
    assert message in str(error.value)
