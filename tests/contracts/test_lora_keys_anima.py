"""Keys and shapes of Anima adapter files, which other programs rely on, at full size."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.anima.layers import NAMES
from library.architectures.anima.model import Anima, read_config
from networks.lora_anima import create_network
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import saved_shapes

pytestmark = pytest.mark.slow

shapes_of = partial(saved_shapes, create_network)

FACTS: Mapping[str, Any] = facts("lora_keys_anima")
BASE: Mapping[str, Any] = facts("anima")
QWEN3 = {
    "vocab_size": 64, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
Models = tuple[nn.Module, nn.Module]


@cache
def full_size_models() -> Models:
    """Return text encoder and denoiser, without weights."""
    from transformers import Qwen3Config, Qwen3Model

    shapes = {name: tuple(shape) for name, shape in BASE["components"]["dit"].items()}
    with torch.device("meta"):
        return Qwen3Model(Qwen3Config(**QWEN3)), Anima(read_config(shapes))


@pytest.fixture(scope="module")
def models() -> Models:
    return full_size_models()


def test_patterns_need_no_quotes(models: Models) -> None:
    quoted = FACTS["variants"]["exclude_patterns single string"]["network_args"]["exclude_patterns"]
    assert shapes_of(models, exclude_patterns=quoted.strip("'")) == shapes_of(models, exclude_patterns=quoted)


def test_generic_names_match_the_comfyui_converter_except_its_typos() -> None:
    for kohya, generic in FACTS["converted"].items():
        wanted = FACTS["misnamed"].get(kohya, {"module_path": generic})["module_path"]
        module = NAMES.find(kohya)
        assert module is not None
        assert (module.kohya, module.generic) == (kohya, wanted)
        assert NAMES.find(generic) is module  # the misspelled names are read too
    assert {module.kohya for module in NAMES.modules} == FACTS["converted"].keys()


def test_each_of_40_blocks_has_the_same_adapted_layers() -> None:
    """The published 2.9B model has the same sizes apart from its number of blocks."""
    shapes = {name: tuple(shape) for name, shape in BASE["components"]["dit"].items()}
    for name, shape in list(shapes.items()):
        if name.startswith("blocks.27."):
            shapes |= {name.replace("27", str(number), 1): shape for number in range(28, 40)}
    config = read_config(shapes)
    with torch.device("meta"):
        model = Anima(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert sum(tensor.numel() for tensor in model.parameters()) == 2_091_068_928 + 12 * 69_206_528
    actual = shapes_of(([], model), False)
    of_28 = {key: shape for key, shape in FACTS["default"].items() if key.startswith("lora_unet")}
    last = {key: shape for key, shape in of_28.items() if "_blocks_27_" in key}
    added = {key.replace("27", str(n), 1): shape for n in range(28, 40) for key, shape in last.items()}
    assert actual == {**of_28, **added}
    for key in added:
        module = NAMES.find(key.split(".")[0])
        assert module is not None and all(NAMES.find(name) == module for name in module.spellings)


def test_diffusers_converts_generic_names_to_our_diffusers_names() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers

    for module in NAMES.modules:
        if module.generic.startswith("diffusion_model."):
            converted = _convert_non_diffusers_anima_lora_to_diffusers({f"{module.generic}.lora_A.weight": 0})
            assert list(converted) == [f"{module.diffusers}.lora_A.weight"]
