"""Keys and shapes of adapter files, which other programs rely on, at full size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.anima.layers import NAMES
from library.architectures.anima.model import Anima, read_config
from library.architectures.flux.layers import view
from library.architectures.flux.model import Flux, FluxConfig
from library.architectures.specs import list_specs
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.recognition import recognise_adapter
from library.models.clip.clip import empty_clip
from library.models.loading import build_on_meta_device
from library.models.t5 import empty_t5
from networks import lora_anima, lora_flux, lora_hunyuan_image, lora_lumina, lora_sd3
from networks.lora_anima import create_network as create_anima
from networks.lora_flux import create_network as create_flux
from tests.contracts import (
    test_chroma_keys,
    test_lora_keys_anima,
    test_lora_keys_flux1,
    test_lora_keys_hunyuan_image,
    test_lora_keys_lumina2,
    test_lora_keys_sd3,
)
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import listed_shapes, saved_shapes, saved_tensors
from tests.tiny.base import Base
from tests.tiny.bases import BASES

pytestmark = pytest.mark.slow

shapes_of = partial(saved_shapes, create_anima)

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


# Keys and shapes of FLUX.1 adapter files, which other programs rely on, at full size.

flux_shapes_of = partial(saved_shapes, create_flux)

FLUX_FACTS: Mapping[str, Any] = facts("lora_keys_flux1")
DEV = FluxConfig(64, 3072, 128, 12288, 4096, 19, 38, has_guidance=True, pooled_width=768)
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
FluxModels = tuple[list[nn.Module], nn.Module]


def full_size(config: FluxConfig) -> FluxModels:
    """Return text encoders and denoiser as network modules see them, without weights."""
    return view([empty_clip(CLIP_L), empty_t5(T5_XXL)], build_on_meta_device(Flux, config))


@cache
def full_size_flux() -> FluxModels:
    return full_size(DEV)


def test_schnell_has_no_guidance_embedder_to_adapt() -> None:
    schnell = full_size(replace(DEV, has_guidance=False))
    assert flux_shapes_of(schnell) == FLUX_FACTS["default"]
    variant = FLUX_FACTS["schnell_in_dims"]
    assert flux_shapes_of(schnell, **variant["network_args"]) == {**FLUX_FACTS["default"], **variant["added"]}


# Keys and shapes of adapter files of full-size transformers, which other programs rely on, as listed from them.

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Listed:
    """What sd-scripts saves of a base model, with its default and other arguments."""

    network_module: Any
    facts: Mapping[str, Any]
    models: Callable[[], Any]
    from_file: tuple[Mapping[str, str], ...] = ({},)  # arguments of files from which networks are made
    left_out: tuple[str, ...] = ()  # variants that differ here on purpose
    renamed: Callable[[Mapping[str, list[int]]], Shapes] = dict


LISTED = {
    "anima": Listed(
        lora_anima, test_lora_keys_anima.FACTS, test_lora_keys_anima.full_size_models,
        ({"train_llm_adapter": "True", "include_patterns": ".*"},),
    ),
    "flux": Listed(
        lora_flux, test_lora_keys_flux1.FACTS, test_lora_keys_flux1.full_size_models,
        ({"train_t5xxl": "True"}, {"in_dims": "[5,6,7,8,9]"}),
    ),
    "chroma": Listed(
        lora_flux, test_chroma_keys.LORA, test_chroma_keys.full_size_models,
        ({"train_approximator": "True", "train_t5xxl": "True", "in_dims": "2,0,0,0,2"},),
    ),
    "lumina": Listed(
        lora_lumina, test_lora_keys_lumina2.LORA, test_lora_keys_lumina2.full_size_models,
        ({"embedder_dims": "[5,6,7]"},), ("mlp_dim", "train_block_indices"),
    ),
    "hunyuan_image": Listed(
        lora_hunyuan_image, test_lora_keys_hunyuan_image.FACTS, test_lora_keys_hunyuan_image.full_size_models,
        renamed=test_lora_keys_hunyuan_image.convert_to_comfy,
    ),
    **{  # sd-scripts trains less than was asked for, in silence, and knows patterns for FLUX only
        name: Listed(
            lora_sd3, facts, partial(test_lora_keys_sd3.full_size_models, name), (),
            ("beyond depth", "network_reg_dims"),
        )
        for name, facts in test_lora_keys_sd3.FACTS["lora"].items()
    },
}  # fmt: skip
TRANSFORMER_NAMES = [pytest.param(name, marks=pytest.mark.nightly if name.endswith("large") else ()) for name in LISTED]
VARIANTS = [
    pytest.param(name, variant, marks=pytest.mark.nightly if name.endswith("large") else ())
    for name, listed in LISTED.items()
    for variant in listed.facts["variants"]
    if not any(word in variant for word in listed.left_out)
]


@pytest.mark.parametrize("name", TRANSFORMER_NAMES)
def test_the_default_has_the_listed_keys(name: str) -> None:
    listed = LISTED[name]
    actual = saved_shapes(listed.network_module.create_network, listed.models())
    assert actual == listed.renamed(listed.facts["default"]) and len(actual) > 500


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_network_arguments_give_the_listed_keys_and_shapes(name: str, variant: str) -> None:
    listed, wanted = LISTED[name], LISTED[name].facts["variants"][variant]
    sides = {"apply_te": wanted.get("train_text_encoder", True), "apply_unet": wanted.get("train_unet", True)}
    create = listed.network_module.create_network
    actual = saved_shapes(create, listed.models(), **{**sides, **wanted.get("call", {})}, **wanted["network_args"])
    assert actual == listed.renamed(listed_shapes(listed.facts, variant))
    assert len(actual) == wanted["num_keys"]


@pytest.mark.parametrize("name", LISTED)
def test_a_network_from_a_file_has_the_keys_of_the_file(name: str) -> None:
    listed = LISTED[name]
    for arguments in listed.from_file:
        shapes = saved_shapes(listed.network_module.create_network, listed.models(), **arguments)
        file = {key: torch.ones(()) if not s else torch.empty(s, device="meta") for key, s in shapes.items()}
        with torch.device("meta"):
            network, _ = listed.network_module.create_network_from_weights(1.0, "file", None, *listed.models(), file)
        assert {key: list(tensor.shape) for key, tensor in saved_tensors(network).items()} == shapes


@pytest.mark.parametrize("spec", [spec for spec in list_specs() if spec.names.modules], ids=lambda spec: spec.name)
def test_every_spelling_finds_its_module_and_no_two_share_one(spec: BaseModelSpec) -> None:
    for module in spec.names.modules:
        assert all(spec.names.find(name) is module for name in (module.kohya, module.generic))
    spellings = [name.replace(".", "_") for module in spec.names.modules for name in set(module.spellings)]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("base", [base for base in BASES.values() if base.listing is not None], ids=lambda b: b.name)
def test_every_module_of_known_files_is_found_and_recognised(base: Base) -> None:
    assert base.listing is not None
    listing = base.listing()
    keys = dict(listing["default"])
    for variant in listing.get("variants", {}).values():
        keys |= variant["added"]
    for name in {key.partition(".")[0] for key in keys}:
        module = base.spec.names.find(name)
        assert module is not None and name in module.spellings
    shapes = {key: tuple(shape) for key, shape in keys.items()}
    spec = recognise_adapter(list_specs(), shapes, {"ss_base_model_version": base.written[0]})
    assert spec is not None and spec.name == base.spec.name
