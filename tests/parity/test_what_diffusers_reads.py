"""Our claims about diffusers against its loader, with full-size transformer files, key by key.

Each tensor is filled with a unique number to trace it through diffusers' renaming.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.flux.layers import CHROMA_NAMES
from library.architectures.specs import list_specs
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.compatibility import Reading, readings
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, sort_tensors
from networks.core.files.renaming import rename
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import listed_shapes
from tests.tiny.base import InDiffusers
from tests.tiny.bases import BASES

Shapes = dict[str, list[int]]
LOADED: Mapping[str, InDiffusers] = {n: base.in_diffusers for n, base in BASES.items() if base.in_diffusers is not None}


@cache
def weights_of(base: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every layer that diffusers can adapt, by model prefix and path."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        models = LOADED[base].models()
        for number, width in enumerate(LOADED[base].clip_widths):
            sizes = {
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": 12 if width == 768 else 32,
            }
            clip = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, num_attention_heads=width // 64))
            models[clip_name(number)] = clip
    return {
        f"{part}.{path.removeprefix('text_model.')}": tuple(module.weight.shape)
        for part, model in models.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def used_by_diffusers(base: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys of a file that reach a layer of diffusers' models; none if it rejects the file."""
    import diffusers.loaders.lora_pipeline as loaders

    numbered = {key: n for n, key in enumerate(tensors, 1)}
    filled = {
        key: tensor if key.endswith(".alpha") else torch.full(tensor.shape, float(numbered[key]))
        for key, tensor in tensors.items()
    }
    try:
        converted = getattr(loaders, LOADED[base].mixin).lora_state_dict(filled)
    except (ValueError, KeyError):
        return set()
    if not all("lora" in key for key in converted):  # load_lora_weights rejects these
        return set()
    layers, used_keys = weights_of(base), set()
    for key, tensor in named_by_peft(base, converted).items():
        path, _, leaf = key.partition(".lora_")
        weight = layers.get(path)
        if weight is not None:
            axis = 1 if leaf == "A.weight" else 0
            assert tensor.shape[axis] == weight[axis], f"{key} does not fit"
            used_keys.add(int(tensor.flatten()[0]))
    used = {key for key, number in numbered.items() if number in used_keys}
    downs = {key: key.replace(".alpha", ".lora_down.weight") for key in tensors if key.endswith(".alpha")}
    return used | {alpha for alpha, down in downs.items() if down in used}


def named_by_peft(base: str, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict as diffusers passes it to PEFT, without the level text_model, which some classes lack."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    peft_state = {key: tensor for key, tensor in converted.items() if not key.startswith("text_encoder")}
    for part in map(clip_name, range(len(LOADED[base].clip_widths))):  # T5 is not adapted
        part_state = {key.removeprefix(f"{part}."): t for key, t in converted.items() if key.startswith(f"{part}.")}
        if part_state:
            part_state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part_state))
        peft_state |= {f"{part}.{key.removeprefix('text_model.')}": tensor for key, tensor in part_state.items()}
    return peft_state


def clip_name(number: int) -> str:
    return "text_encoder" if number == 0 else f"text_encoder_{number + 1}"


def of_rank_one(key: str, shape: list[int]) -> list[int]:
    """Return the shape of a factor reduced to rank 1, which suffices here."""
    if key.endswith(".lora_down.weight"):
        return [1, *shape[1:]]
    return [shape[0], 1, *shape[2:]] if key.endswith(".lora_up.weight") else shape


def file_of(base: str, variant: str, naming: FileNaming) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of an adapter file whose alphas equal the ranks, so that values stay unchanged."""
    listing = listing_of(base)
    shapes: Shapes = listing["default"] if variant == "default" else listed_shapes(listing, variant)
    tensors = {key: torch.ones(()).expand(of_rank_one(key, shape)) for key, shape in shapes.items()}
    file = AdapterFile(
        "x", sort_tensors(tensors, {}, "").modules, {"ss_base_model_version": BASES[base].written[0]}, {}
    )
    return adapter_tensors(rename(file, BASES[base].spec.names, naming).file), dict(file.metadata)


def listing_of(base: str) -> Mapping[str, Any]:
    listing = BASES[base].listing
    assert listing is not None
    return listing()


CASES = [
    (base, variant, naming) for base, loaded in LOADED.items() for variant in loaded.variants for naming in NAMINGS
]


def claim_about(program: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Reading:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    (claim,) = (reading for reading in readings(list_specs(), shapes, metadata) if reading.program == program)
    return claim


@pytest.mark.parametrize(("base", "variant", "naming"), CASES)
def test_the_keys_we_claim_diffusers_uses_are_those_that_reach_a_layer(
    base: str, variant: str, naming: FileNaming
) -> None:
    tensors, metadata = file_of(base, variant, naming)
    claim = claim_about("diffusers", tensors, metadata)
    assert tensors.keys() - set(claim.unused) == used_by_diffusers(base, tensors)


@pytest.mark.parametrize("naming", NAMINGS)
def test_an_adapted_approximator_loads_under_diffusers_names(naming: FileNaming) -> None:
    shapes = {name: shape for name, shape in facts("chroma")["components"]["dit"].items() if name.endswith("weight")}
    tensors: dict[str, Tensor] = {"lora_unet_double_blocks_0_img_mlp_0.alpha": torch.ones(())}
    for module in CHROMA_NAMES.modules:
        rows, columns = shapes.get(f"{module.generic.removeprefix('diffusion_model.')}.weight", (0, 0))
        if module.kohya.startswith(("lora_unet_distilled", "lora_unet_double")):
            tensors[f"{module.kohya}.lora_down.weight"] = torch.ones(()).expand(1, columns)
            tensors[f"{module.kohya}.lora_up.weight"] = torch.ones(()).expand(rows, 1)
    file = AdapterFile("x", sort_tensors(tensors, {}, "").modules, {}, {})
    tensors = adapter_tensors(rename(file, CHROMA_NAMES, naming).file)
    used = used_by_diffusers("chroma", tensors)
    assert tensors.keys() - set(claim_about("diffusers", tensors, {}).unused) == used
    assert any("distilled" in key for key in used) == (naming == "diffusers")


@pytest.mark.parametrize(
    ("left_out", "num_used"),
    [("final_layer", 356), ("layers_25_|final_layer", 344), ("layers_3_|final_layer", 0), ("mod|final_layer", 0)],
)
def test_diffusers_reads_only_complete_leading_blocks_of_generic_lumina_files(left_out: str, num_used: int) -> None:
    tensors, metadata = file_of("lumina", "network_train_unet_only", "generic")
    remaining = {key: tensor for key, tensor in tensors.items() if not re.search(left_out, key.replace(".", "_"))}
    assert len(remaining) < len(tensors)
    used = used_by_diffusers("lumina", remaining)
    assert len(used) == num_used
    assert remaining.keys() - set(claim_about("diffusers", remaining, metadata).unused) == used
