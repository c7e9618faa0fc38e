"""Names and shapes of full-size transformers and text encoders, in files and adapters, as in diffusers."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.flux_2.mistral import empty_mistral
from library.architectures.flux_2.releases import DEV, KLEIN_4B, KLEIN_9B, Release
from library.architectures.krea2.load import FILES as KREA_2
from library.architectures.krea2.text import LAYERS
from library.architectures.specs import list_specs
from library.architectures.zimage.load import FILES as Z_IMAGE
from library.checkpoints.base_files import BaseFiles
from library.models.adapter_views import view_denoiser
from library.models.identify import base_of_file
from library.models.loading import build_on_meta_device
from library.models.qwen3 import empty_qwen3
from library.models.qwen3_vl import empty_qwen3_vl
from networks.core.files.reading_writing import collect_saved_tensors
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.hiding import lazily
from tests.recognising import base_of
from tests.tiers import first_is_fast
from tests.tiny import flux_2 as tiny
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tests.tiny.flux_2 import full_size_encoder
from tests.tiny.krea2 import FULL_SIZE, full_size_qwen3_vl
from tests.tiny.zimage import full_size_qwen3

loaders = lazily("diffusers.loaders.lora_pipeline")
single_file = lazily("diffusers.loaders.single_file_utils")

DITS = {name: base for name, base in BASES.items() if base.dit is not None}
SIZES = first_is_fast((name, size) for name, base in DITS.items() for size in base.dit.full_size)  # type: ignore[union-attr]
CONVERTED = {  # those with other names in diffusers -> its converter
    "zimage": "convert_z_image_transformer_checkpoint_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "flux_2": "convert_flux2_transformer_checkpoint_to_diffusers",
}


def part_of(base: Base, module: str) -> Any:
    return import_module(f"library.architectures.{base.package}.{module}")


@cache
def ours(name: str, size: str) -> nn.Module:
    dit = DITS[name].dit
    assert dit is not None
    return build_on_meta_device(type(dit.model()), dit.full_size[size][0])


def default_of_diffusers(name: str) -> Any:
    in_diffusers = DITS[name].in_diffusers
    assert in_diffusers is not None
    with torch.device("meta"):
        return in_diffusers.models()["transformer"]


@cache
def theirs(name: str, size: str) -> nn.Module:
    base, kind = DITS[name], type(default_of_diffusers(name))
    with torch.device("meta"):
        return kind(**part_of(base, "reference").diffusers_config(base.dit.full_size[size][0]))  # type: ignore[no-any-return, union-attr]


def linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_our_names_load_into_the_diffusers_model(name: str, size: str) -> None:
    state: dict[str, Tensor] = dict(ours(name, size).state_dict())
    assert sum(tensor.numel() for tensor in state.values()) == DITS[name].dit.full_size[size][1]  # type: ignore[union-attr]
    if name == "zimage":  # whose checkpoints have an unused norm
        state = {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}
        state["norm_final.weight"] = torch.empty(3840, device="meta")
    converted = getattr(single_file, CONVERTED[name])(state) if name in CONVERTED else state
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == shapes_of_model(theirs(name, size))


@pytest.mark.parametrize("name", DITS)
def test_the_sizes_of_one_release_are_the_defaults_of_diffusers(name: str) -> None:
    base = DITS[name]
    assert base.dit is not None
    configs = [part_of(base, "reference").diffusers_config(config) for config, _ in base.dit.full_size.values()]
    defaults = {key: plain(value) for key, value in default_of_diffusers(name).config.items()}
    assert any(all(defaults[key] == plain(value) for key, value in config.items()) for config in configs)


def plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("name", "size"), SIZES)
def test_the_denoiser_loads_from_the_names_of_either_layout(name: str, size: str, prefix: str) -> None:
    expected, base = shapes_of_model(ours(name, size)), DITS[name]
    file = base.spec.open_for_merging.__self__  # type: ignore[attr-defined]
    for model in (ours(name, size), theirs(name, size)):
        shapes = {prefix + key: shape for key, shape in shapes_of_model(model).items()}
        weights = file.read(list_specs(), BaseFiles(Path("file"), weights_of_shapes(shapes)))
        assert dict(weights.shapes) == expected
        assert part_of(base, "model").read_config(weights.shapes) == base.dit.full_size[size][0]  # type: ignore[union-attr]
        assert base_of_file(list_specs(), shapes).name == name  # type: ignore[union-attr]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["own", "networks.dylora"])
@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_module_of_a_saved_file_is_a_layer_that_diffusers_finds(
    name: str, size: str, kind: str, everywhere: bool
) -> None:
    base, dit = DITS[name], DITS[name].dit
    assert dit is not None and base.in_diffusers is not None
    arguments = dit.own[-1] if everywhere and kind == "own" else {}
    module = import_module(base.module if kind == "own" else kind)
    network = module.create_network(1.0, 4, 4, None, *view_denoiser([], ours(name, size)), **arguments)
    assert all(dit.names.find(path).kohya == path for path in network.adapters)  # type: ignore[union-attr]
    tensors = collect_saved_tensors(network.adapters, None, dit.names)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    layers = linear(theirs(name, size) if name == "zimage" else ours(name, size))  # Z-Image's are saved split
    layers = {path: m for path, m in layers.items() if re.match(dit.adapted[bool(arguments)], path)}
    ranks = {path: 2 if re.match(dit.embedders, path) else 4 for path in layers}
    expected = {f"{dit.prefix}.{path}.lora_A.weight": (ranks[path], m.in_features) for path, m in layers.items()}
    expected |= {f"{dit.prefix}.{path}.lora_B.weight": (m.out_features, ranks[path]) for path, m in layers.items()}
    assert shapes == expected and len(layers) > 50
    assert base_of(shapes) == name
    found, mixin = linear(theirs(name, size)), getattr(loaders, base.in_diffusers.mixin)
    for key, tensor in mixin.lora_state_dict({key: torch.empty(shape) for key, shape in shapes.items()}).items():
        path, _, leaf = key.removeprefix("transformer.").partition(".lora_")
        features = (found[path].in_features, 1) if leaf == "A.weight" else (found[path].out_features, 0)
        assert tensor.shape[features[1]] == features[0]


@pytest.mark.parametrize("name", DITS)
def test_adapter_paths_match_the_layers(name: str) -> None:
    listing, (size, *_) = DITS[name].listing, reversed(DITS[name].dit.full_size)  # type: ignore[union-attr]
    assert listing is not None
    stems = {key.partition(".")[0] for key in listing()["default"]}
    assert stems == {f"lora_unet_{path.replace('.', '_')}" for path in linear(ours(name, size))}


@pytest.mark.parametrize(
    ("stem", "width", "name"),
    [
        ("lora_unet_blocks_4_attn_wq", 6144, "krea2"),
        ("lora_unet_blocks_4_mlp_gate", 6144, "krea2"),
        ("diffusion_model.txtfusion.projector", 12, "krea2"),
        ("base_model.model.blocks.4.attn.gate", 6144, "krea2"),
        ("transformer.transformer_blocks.4.attn.to_gate", 6144, "krea2"),
        ("transformer.transformer_blocks.4.ff.down", 16384, "krea2"),
        ("lora_unet_blocks_4_mlp_layer1", 2048, "anima"),
        ("transformer.transformer_blocks.4.attn.add_q_proj", 6144, "flux_2"),
        *(
            (f"{prefix}{path.replace('.', dot)}", width, name)
            for path in ("layers.29.attention.qkv", "layers.0.feed_forward.w1", "layers.3.attention.out")
            for prefix, dot in (("lora_unet_", "_"), ("diffusion_model.", "."))
            for width, name in ((3840, "zimage"), (2304, "lumina"))
        ),
        ("lora_unet_transformer_blocks_3_img_mlp_proj", 4096, "qwen_image_21"),
        ("lora_unet_transformer_blocks_3_img_mlp_out", 12288, "qwen_image_21"),
        ("diffusion_model.transformer_blocks.12.attn.to_q", 4096, "qwen_image_21"),
        ("transformer.transformer_blocks.31.attn.to_out.0", 4096, "qwen_image_21"),
        ("transformer.transformer_blocks.4.attn.to_q", 4096, "flux_2"),  # klein 9B; the metadata decides
        ("transformer.single_transformer_blocks.12.attn.to_out", 16384, "flux_2"),
        ("lora_unet_double_blocks_4_img_attn_qkv", 3072, "flux"),  # as wide as klein 4B; the metadata decides
        ("lora_unet_double_blocks_4_img_attn_qkv", 4096, "flux_2"),
        ("lora_unet_double_blocks_4_img_attn_qkv", 6144, "flux_2"),
        ("lora_unet_double_blocks_4_img_mlp_2", 12288, "flux"),
        ("lora_unet_double_blocks_4_img_mlp_2", 9216, "flux_2"),
        ("lora_unet_single_blocks_4_linear2", 15360, "flux"),
        ("lora_unet_single_blocks_4_linear2", 12288, "flux_2"),
        ("diffusion_model.single_blocks.4.linear2", 12288, "flux_2"),
        ("transformer.transformer_blocks.4.attn.to_q", 3072, "flux"),
        ("transformer.transformer_blocks.4.attn.to_q", 6144, "flux_2"),
        ("transformer.single_transformer_blocks.4.attn.to_out", 12288, "flux_2"),
    ],
)
def test_files_are_distinguished_from_models_with_similar_names(stem: str, width: int, name: str) -> None:
    assert base_of({f"{stem}.lora_down.weight": (4, width), f"{stem}.lora_up.weight": (8, 4)}) == name


def test_a_file_with_diffusers_names_is_not_mistaken_for_a_model_of_equal_width() -> None:
    widths = {f"transformer.transformer_blocks.0.{layer}": 6144 for layer in ("attn.to_q", "attn.to_gate", "ff.up")}
    shapes = {f"{stem}.lora_A.weight": (4, width) for stem, width in widths.items()}
    assert base_of(shapes | {f"{stem}.lora_B.weight": (8, 4) for stem in widths}) == "krea2"


# Names and shapes of full-size text encoders of FLUX.2, Krea 2 and Z-Image.


@pytest.mark.parametrize(
    ("release", "prefix"),
    [(DEV, p) for p in ("", "model.", "language_model.model.", "model.language_model.", DEV.encoder.model.prefix)]
    + [(r, p) for r in (KLEIN_4B, KLEIN_9B) for p in ("", "model.", r.encoder.model.prefix)],
    ids=lambda value: value.name if isinstance(value, Release) else value,
)
def test_the_used_text_encoder_layers_load_with_every_prefix(release: Release, prefix: str) -> None:
    shapes = shapes_of_model(full_size_encoder(release.name))
    num_layers = release.encoder.layers[-1]
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.") or int(k.split(".")[1]) < num_layers}
    weights = weights_of_shapes({prefix + name: shape for name, shape in shapes.items()})
    component = release.encoder.model.open(None, weights)
    empty = empty_mistral if release is DEV else empty_qwen3
    assert shapes_of_model(empty(component.config)) == expected
    assert component.config["hidden_size"] * len(release.encoder.layers) == release.text_width
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": num_layers}
    assert heads.items() <= component.config.items()


def test_mistral_has_no_sliding_window() -> None:
    config = {**tiny.MISTRAL, "vocab_size": 8, "num_hidden_layers": 1}
    assert empty_mistral(config).config.sliding_window is None


def test_the_used_layers_of_krea_2s_text_encoder_load() -> None:
    shapes = shapes_of_model(full_size_qwen3_vl())
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.35.")}
    names = {f"model.language_model.{name}": shape for name, shape in shapes.items()}
    weights = weights_of_shapes({**names, "model.visual.pos_embed.weight": (2304, 1024)})
    component = KREA_2.encoder.open(None, weights)
    assert shapes_of_model(empty_qwen3_vl(component.config)) == expected
    assert component.config["hidden_size"] == FULL_SIZE.fusion.width and len(LAYERS) == FULL_SIZE.num_states
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 35}
    assert heads.items() <= component.config.items()


@pytest.mark.parametrize("prefix", [Z_IMAGE.encoder.prefix, "model.", ""])
def test_qwen3_4b_loads_with_every_prefix(prefix: str) -> None:
    expected = shapes_of_model(full_size_qwen3())
    weights = weights_of_shapes({prefix + name: shape for name, shape in expected.items()})
    component = Z_IMAGE.encoder.open(None, weights)
    assert shapes_of_model(empty_qwen3(component.config)) == expected
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36}
    assert heads.items() <= component.config.items()
