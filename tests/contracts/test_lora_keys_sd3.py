"""Keys and shapes of adapter files of Stable Diffusion 3 and 3.5, which other programs rely on, at full size."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.sd3.layers import view
from library.architectures.sd3.model import MMDiT, read_config
from library.models.clip.clip import empty_clip
from library.models.t5 import empty_t5
from networks.lora_sd3 import create_network
from tests.contracts.saved_tensors import saved_shapes
from tests.contracts.test_lora_keys_flux1 import CLIP_L, T5_XXL
from tests.tiers import first_is_fast
from tests.tiny.sd3 import full_size_keys

pytestmark = pytest.mark.slow

FACTS = full_size_keys()


@cache
def encoders() -> list[nn.Module]:
    giant = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    with torch.device("meta"):
        return [*(empty_clip(sizes, projects=True) for sizes in (CLIP_L, giant)), empty_t5(T5_XXL)]


@cache
def full_size_models(name: str) -> Any:
    """Return the weightless view of a full-size model for network modules."""
    with torch.device("meta"):
        return view(encoders(), MMDiT(read_config({key: tuple(shape) for key, shape in FACTS["mmdit"][name].items()})))


@pytest.mark.parametrize("name", first_is_fast(FACTS["lora"]))
def test_patterns_set_ranks(name: str) -> None:
    shapes = saved_shapes(create_network, full_size_models(name), network_reg_dims="x_block=8")
    default = FACTS["lora"][name]["default"]
    assert shapes.keys() == default.keys()
    changed = {key for key in shapes if shapes[key] != default[key]}
    assert changed == {key for key in default if "x_block" in key and not key.endswith(".alpha")}
