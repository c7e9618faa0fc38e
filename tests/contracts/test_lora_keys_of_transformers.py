"""Keys and shapes of adapter files of full-size transformers, which other programs rely on, as listed from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from library.architectures.specs import list_specs
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.recognition import recognise_adapter
from networks import lora_anima, lora_flux, lora_hunyuan_image, lora_lumina, lora_sd3
from tests.contracts import (
    test_chroma_keys,
    test_lora_keys_anima,
    test_lora_keys_flux1,
    test_lora_keys_hunyuan_image,
    test_lora_keys_lumina2,
    test_lora_keys_sd3,
)
from tests.contracts.saved_tensors import listed_shapes, saved_shapes, saved_tensors
from tests.tiny.base import Base
from tests.tiny.bases import BASES

pytestmark = pytest.mark.slow
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
NAMES = [pytest.param(name, marks=pytest.mark.nightly if name.endswith("large") else ()) for name in LISTED]
VARIANTS = [
    pytest.param(name, variant, marks=pytest.mark.nightly if name.endswith("large") else ())
    for name, listed in LISTED.items()
    for variant in listed.facts["variants"]
    if not any(word in variant for word in listed.left_out)
]


@pytest.mark.parametrize("name", NAMES)
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
