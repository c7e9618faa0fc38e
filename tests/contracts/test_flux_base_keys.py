"""Names and shapes of the four full-size FLUX.1 files are a contract, in every published layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.flux.layers import KEYS
from library.architectures.flux.load import CLIP_PREFIXES, read_denoiser
from library.architectures.flux.model import Flux, read_config
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import with_prefix
from library.models.clip.clip import clip_component, empty_clip
from library.models.loading import build_on_meta_device
from library.models.t5 import T5_XXL_NAMES, empty_t5, t5_component
from library.models.vae.flux import CHANNELS, check_channels
from library.models.vae.vae import empty_vae, single_vae
from tests.contracts.full_size import facts, weights_of_shapes

FACTS: Mapping[str, Any] = facts("flux1")


def shapes_of(part: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in FACTS["components"][part].items()}


def flux_shapes(config_of: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    model = build_on_meta_device(Flux, read_config(config_of))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_the_denoiser_has_the_names_and_shapes_of_the_file(prefix: str, kind: str) -> None:
    expected = shapes_of("dit")
    if kind == "schnell":
        expected = {name: shape for name, shape in expected.items() if not name.startswith("guidance_in.")}
    weights = read_denoiser(
        BaseFiles(Path("file"), weights_of_shapes({prefix + name: shape for name, shape in expected.items()})), "flux"
    )
    assert flux_shapes(weights.shapes) == expected == dict(weights.shapes)
    num_values = sum(torch.Size(shape).numel() for shape in expected.values())
    assert num_values == {"dev": 11_901_408_320, "schnell": 11_891_178_560}[kind]


@pytest.mark.parametrize("first", [True, False], ids=["denoiser first", "other parts first"])
def test_the_denoiser_loads_from_a_file_with_all_parts(first: bool) -> None:
    dit = {f"model.diffusion_model.{name}": shape for name, shape in shapes_of("dit").items()}
    other = {f"vae.{name}": shape for name, shape in shapes_of("ae").items()}
    weights = read_denoiser(
        BaseFiles(Path("file"), weights_of_shapes({**dit, **other} if first else {**other, **dit})), "flux"
    )
    assert dict(weights.shapes) == shapes_of("dit")


def test_pruned_models_load() -> None:
    shapes = {
        name: shape
        for name, shape in shapes_of("dit").items()
        if not name.startswith("double_blocks") or int(name.split(".")[1]) < 5
    }
    assert flux_shapes(shapes) == shapes


def test_the_map_covers_every_slice_of_the_diffusers_tensors() -> None:
    pieces: dict[str, dict[int, str]] = {}
    for theirs, (ours, piece) in FACTS["diffusers"].items():
        pieces.setdefault(ours, {})[piece] = theirs
    assert pieces.keys() == shapes_of("dit").keys()
    for ours, slices in pieces.items():
        assert KEYS.source_keys(ours) == tuple(slices[piece] for piece in sorted(slices)), ours
    assert set(KEYS.our_keys(FACTS["diffusers"])) == set(pieces)


def test_the_diffusers_layout_converts_to_our_shapes() -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        theirs = FluxTransformer2DModel(guidance_embeds=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert dict(KEYS.from_diffusers(weights_of_shapes(shapes)).shapes) == shapes_of("dit")


@pytest.mark.parametrize("prefix", ["", CLIP_PREFIXES[0]])
@pytest.mark.parametrize(
    "extra", [{}, {"text_projection.weight": (768, 768), "text_model.embeddings.position_ids": (1, 77)}]
)
def test_clip_l_loads_with_every_prefix(prefix: str, extra: dict[str, tuple[int, ...]]) -> None:
    shapes = {prefix + name: shape for name, shape in {**shapes_of("clip_l"), **extra}.items()}
    component = clip_component(with_prefix(weights_of_shapes(shapes), prefix), "gelu")
    model = empty_clip(component.config)
    wanted = {
        f"text_model.{name.removeprefix('text_model.')}": tuple(t.shape) for name, t in model.state_dict().items()
    }
    assert wanted == shapes_of("clip_l")
    assert (component.config["hidden_act"], component.config["num_attention_heads"]) == ("gelu", 12)


@pytest.mark.parametrize("prefix", T5_XXL_NAMES)
@pytest.mark.parametrize("words", ["both", "shared.weight", "encoder.embed_tokens.weight"])
def test_t5_loads_with_both_embedding_names_and_every_prefix(prefix: str, words: str) -> None:
    stored = {
        name: shape
        for name, shape in shapes_of("t5xxl").items()
        if words == "both" or name == words or name not in ("shared.weight", "encoder.embed_tokens.weight")
    }
    component = t5_component(weights_of_shapes({prefix + name: shape for name, shape in stored.items()}))
    model = empty_t5(component.config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes_of("t5xxl")
    assert component.config["num_heads"] == component.config["d_kv"] == 64
    assert model.encoder.embed_tokens is model.shared


def test_ae_safetensors_matches_the_diffusers_vae_without_quant_convs() -> None:
    component = single_vae(weights_of_shapes(shapes_of("ae")))
    check_channels("FLUX.1", "--ae", component, CHANNELS)
    model = empty_vae(component.config)
    assert len(model.state_dict()) == len(shapes_of("ae"))
    for name, tensor in model.state_dict().items():
        assert tensor.numel() == torch.Size(component.weights.shapes[name]).numel(), name
