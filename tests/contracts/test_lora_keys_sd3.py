"""Keys and shapes of adapter files of Stable Diffusion 3 and 3.5, which other programs rely on, at full size."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.sd3.model import MMDiT, read_config
from library.architectures.sd3.targets import view
from networks.lora_sd3 import create_network
from tests.contracts.saved_tensors import listed_shapes, saved_shapes
from tests.tiny.sd3 import full_size_keys

pytestmark = pytest.mark.slow

shapes_of = partial(saved_shapes, create_network)

FACTS = full_size_keys()
MODELS = list(FACTS["lora"])
REFUSED = ("train_block_indices beyond depth",)
"""sd-scripts trains less than was asked for, in silence; here it is an error."""
UNLIKE = ("network_reg_dims (ignored)",)
"""sd-scripts knows them for FLUX only; here they act on every base model."""
VARIANTS = [name for name in FACTS["lora"]["sd3-medium"]["variants"] if name not in (*REFUSED, *UNLIKE)]


@pytest.fixture(scope="module")
def encoders() -> list[nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    giant = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        clips = [CLIPTextModelWithProjection(CLIPTextConfig(**sizes)) for sizes in (large, giant)]
        return [*clips, T5EncoderModel(t5)]


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.nightly if n.endswith("large") else ()) for n in MODELS]
)
def model(request: pytest.FixtureRequest, encoders: list[nn.Module]) -> tuple[str, Any]:
    """Return the name of a full-size model and its weightless view for network modules."""
    keys = {key: tuple(shape) for key, shape in FACTS["mmdit"][request.param].items()}
    with torch.device("meta"):
        denoiser = MMDiT(read_config(keys))
    return request.param, view(encoders, denoiser)


def expected_keys(name: str, variant: str) -> dict[str, list[int]]:
    facts = FACTS["lora"][name]
    expected = listed_shapes(facts, variant)
    assert len(expected) == facts["variants"][variant]["num_keys"]
    return expected


def test_the_default_has_the_listed_keys(model: tuple[str, Any]) -> None:
    name, views = model
    assert shapes_of(views) == FACTS["lora"][name]["default"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_network_arguments_give_the_listed_keys_and_shapes(model: tuple[str, Any], variant: str) -> None:
    name, views = model
    facts = FACTS["lora"][name]["variants"][variant]
    assert shapes_of(views, **facts["call"], **facts["network_args"]) == expected_keys(name, variant)


def test_patterns_set_ranks(model: tuple[str, Any]) -> None:
    name, views = model
    shapes = shapes_of(views, network_reg_dims="x_block=8")
    default = FACTS["lora"][name]["default"]
    assert shapes.keys() == default.keys()
    changed = {key for key in shapes if shapes[key] != default[key]}
    assert changed == {key for key in default if "x_block" in key and not key.endswith(".alpha")}


def test_block_indices_out_of_range_are_rejected(model: tuple[str, Any]) -> None:
    with pytest.raises(ValueError, match="train_block_indices names block 500"):
        shapes_of(model[1], train_block_indices="0,500")


def test_embedders_need_six_ranks(model: tuple[str, Any]) -> None:
    with pytest.raises(ValueError, match="emb_dims has 2 entries; it needs 6"):
        shapes_of(model[1], emb_dims="[4,4]")
