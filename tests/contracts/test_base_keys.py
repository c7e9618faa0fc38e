"""The names and shapes of full-size checkpoints of Stable Diffusion 1.5 to 3 are a contract, in every layout."""

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
from library.architectures.sd.load import CLIP_PREFIXES, NUM_SD2_LAYERS, single_file_parts
from library.architectures.sd3.model import MMDiT, read_config
from library.architectures.sdxl.load import CLIP_G_PREFIX, CLIP_L_PREFIX
from library.architectures.specs import list_specs
from library.architectures.zimage.load import FILES as Z_IMAGE
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights
from library.models.adapter_views import view_denoiser
from library.models.clip.clip import PROJECTION, clip_body, clip_from_any, empty_clip, from_open_clip, open_clip_name
from library.models.identify import base_of_file
from library.models.loading import Component, build_on_meta_device, is_same_matrix
from library.models.qwen3 import empty_qwen3
from library.models.qwen3_vl import empty_qwen3_vl
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_from_ldm, unet_to_ldm
from library.models.unet.unet import empty_unet, unet_layout
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_from_ldm, vae_to_ldm
from library.models.vae.vae import empty_vae, vae_of_checkpoint
from library.options.model import BASE_FLAG
from networks.core.files.reading_writing import collect_saved_tensors
from tests.contracts.full_size import (
    SDXL_LAYOUT,
    checkpoint,
    empty_encoders,
    facts,
    parts,
    shapes_of_model,
    weights_of_shapes,
)
from tests.hiding import lazily
from tests.recognising import base_of
from tests.tiers import first_is_fast
from tests.tiny import flux_2 as tiny
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tests.tiny.flux_2 import full_size_encoder
from tests.tiny.krea2 import FULL_SIZE, full_size_qwen3_vl
from tests.tiny.sd import full_size_keys
from tests.tiny.sd3 import full_size_keys as sd3_keys
from tests.tiny.zimage import full_size_qwen3

FACTS = full_size_keys()


def names_and_shapes() -> Weights:
    """Return the full-size checkpoint with its tensors on the meta device."""
    sizes = {name: tuple(shape) for name, shape in FACTS["checkpoint"].items()}
    return Weights("sd15", sizes, lambda name: torch.empty(sizes[name], device="meta"))


def module_parts() -> dict[str, Component]:
    return {
        **single_file_parts(BASE_FLAG, names_and_shapes(), "sd1"),
        "vae": vae_of_checkpoint(BASE_FLAG, names_and_shapes()),
    }


def test_vae_names_survive_a_round_trip():
    for path, name in FACTS["diffusers"]["vae"].items():
        ldm = name.removeprefix(VAE_PREFIX)
        assert (vae_from_ldm(ldm, 4), vae_to_ldm(path, 4)) == (path, ldm)


def test_every_text_encoder_name_only_loses_its_prefix():
    for path, name in FACTS["diffusers"]["text_encoder"].items():
        assert name == CLIP_PREFIXES["sd1"] + path


def test_the_unet_config_is_inferred_from_shapes():
    config = module_parts()["unet"].config
    assert config == {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "norm_num_groups": 32,
    }


def test_the_vae_config_is_inferred_from_shapes():
    config = module_parts()["vae"].config
    assert config["block_out_channels"] == (128, 256, 512, 512)
    assert (config["layers_per_block"], config["latent_channels"], config["norm_num_groups"]) == (2, 4, 32)
    assert config["use_quant_conv"] and config["use_post_quant_conv"]


def test_the_text_encoder_config_is_inferred_from_shapes():
    config = module_parts()["text_encoder"].config
    wanted = {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted


def test_the_modules_have_exactly_the_weights_of_the_checkpoint():
    components = module_parts()
    modules = {
        "unet": empty_unet(components["unet"].config),
        "vae": empty_vae(components["vae"].config),
        "text_encoder": clip_body(empty_clip(components["text_encoder"].config)),
    }
    num_parameters = {}
    for part, module in modules.items():
        has = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        file = components[part].weights.shapes
        assert has.keys() == file.keys()
        assert all(is_same_matrix(file[name], has[name]) for name in has)
        num_parameters[part] = sum(p.numel() for p in module.parameters())
    assert num_parameters == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


# Names and shapes in the published checkpoints of Stable Diffusion 2.1 and XL, at full size and without weights.

SD_LAYOUT = UnetLayout(layers_per_block=2, has_attention=(True, True, True, False))
LAYOUTS = {"sd15": SD_LAYOUT, "sd21": SD_LAYOUT, "sdxl": SDXL_LAYOUT}
OPEN_CLIP = {"sd21": ("text_encoder", CLIP_PREFIXES["sd2"]), "sdxl": ("text_encoder_2", CLIP_G_PREFIX)}


@pytest.mark.parametrize("model", LAYOUTS)
def test_unet_names_survive_a_round_trip(model):
    for path, name in facts(model)["diffusers"]["unet"].items():
        ldm = name.removeprefix(UNET_PREFIX)
        assert (unet_from_ldm(ldm, LAYOUTS[model]), unet_to_ldm(path, LAYOUTS[model])) == (path, ldm)


@pytest.mark.parametrize("model", OPEN_CLIP)
def test_every_openclip_name_is_converted(model):
    part, prefix = OPEN_CLIP[model]
    for path, name in facts(model)["diffusers"][part].items():
        if isinstance(name, str) and not name.endswith("text_projection"):
            assert open_clip_name(name.removeprefix(prefix)) == clip_from_any(path)


@pytest.mark.parametrize("model", OPEN_CLIP)
def test_fused_qkv_is_split_into_the_projections_of_transformers(model):
    part, prefix = OPEN_CLIP[model]
    shapes = {n.removeprefix(prefix): s for n, s in checkpoint(model).shapes.items() if n.startswith(prefix)}
    counted = {name: shape for name, shape in shapes.items() if shape}
    values = {name: torch.arange(shape[0]).view(-1, *(1,) * (len(shape) - 1)) for name, shape in counted.items()}
    renamed = from_open_clip(Weights(model, shapes, lambda name: values[name]))
    packed = {path: name for path, name in facts(model)["diffusers"][part].items() if not isinstance(name, str)}
    assert packed
    for path, (name, third) in packed.items():
        rows = renamed.read(clip_from_any(path)).flatten()
        size = shapes[name.removeprefix(prefix)][0] // 3
        assert rows.tolist() == list(range(third * size, (third + 1) * size))


def test_clip_l_of_sdxl_only_loses_its_prefix():
    names = {n.removeprefix(CLIP_L_PREFIX) for n in checkpoint("sdxl").shapes if n.startswith(CLIP_L_PREFIX)}
    assert {clip_from_any(name) for name in names} == set(parts("sdxl")["text_encoder"].weights.shapes)


@pytest.mark.parametrize("model", LAYOUTS)
def test_the_unet_layout_is_inferred_from_names(model):
    names = {n.removeprefix(UNET_PREFIX): s for n, s in checkpoint(model).shapes.items() if n.startswith(UNET_PREFIX)}
    assert unet_layout(names) == LAYOUTS[model]


def test_the_sd21_unet_config_is_inferred_from_shapes():
    config = parts("sd21")["unet"].config
    wanted = {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "transformer_layers_per_block": 1,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "norm_num_groups": 32,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_the_sdxl_unet_config_is_inferred_from_shapes():
    config = parts("sdxl")["unet"].config
    wanted = {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert config["transformer_layers_per_block"][1:] == (2, 10)


def test_text_encoder_configs_are_inferred_from_shapes():
    sdxl = parts("sdxl")
    actual = {
        "sd21": parts("sd21")["text_encoder"].config,
        "clip_l": sdxl["text_encoder"].config,
        "clip_g": sdxl["text_encoder_2"].config,
    }
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    assert {name: tuple(config[key] for key in keys) for name, config in actual.items()} == {
        "sd21": (1024, 4096, NUM_SD2_LAYERS, 16, "gelu"),
        "clip_l": (768, 3072, 12, 12, "quick_gelu"),
        "clip_g": (1280, 5120, 32, 20, "gelu"),
    }
    assert actual["clip_g"]["projection_dim"] == 1280


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("sd21", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
    ],
)
def test_the_modules_have_exactly_the_weights_of_the_checkpoint_sd21_sdxl(model, wanted):
    components = parts(model)
    encoders = dict(
        zip((p for p in components if p.startswith("text_encoder")), empty_encoders(components), strict=True)
    )
    modules = {"unet": empty_unet(components["unet"].config), "vae": empty_vae(components["vae"].config), **encoders}
    for part, module in modules.items():
        has = {clip_from_any(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        file = components[part].weights.shapes
        assert has.keys() == file.keys()
        assert all(is_same_matrix(file[name], has[name]) for name in has)
    assert {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()} == wanted
    assert (PROJECTION in components["text_encoder_2"].weights.shapes) if model == "sdxl" else True


# The names and shapes of the full-size checkpoints of Stable Diffusion 3 and 3.5 are a contract.

FACTS_SD3 = sd3_keys()
PARAMETERS = {"sd3-medium": 2_084_951_104, "sd3.5-medium": 2_469_663_936, "sd3.5-large": 8_146_280_768}


@pytest.mark.parametrize("name", FACTS_SD3["mmdit"])
def test_the_denoiser_has_exactly_the_weights_of_the_checkpoint(name: str) -> None:
    expected = {key: tuple(shape) for key, shape in FACTS_SD3["mmdit"][name].items()}
    with torch.device("meta"):
        model = MMDiT(read_config(expected))
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == PARAMETERS[name]


def test_hyperparameters_are_inferred_from_shapes() -> None:
    configs = {name: read_config({k: tuple(s) for k, s in keys.items()}) for name, keys in FACTS_SD3["mmdit"].items()}
    medium, medium_5, large = (configs[name] for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large"))
    assert (medium.width, medium.depth, medium.head_width, medium.positions_side) == (1536, 24, 64, 192)
    assert (medium_5.width, medium_5.depth, medium_5.head_width, medium_5.positions_side) == (1536, 24, 64, 384)
    assert (large.width, large.depth, large.head_width, large.positions_side) == (2432, 38, 64, 192)
    assert [c.norms_queries for c in (medium, medium_5, large)] == [False, True, True]
    assert [c.dual_attention for c in (medium, medium_5, large)] == [set(), set(range(13)), set()]


def test_a_checkpoint_with_a_missing_part_raises_an_error_that_names_it() -> None:
    keys = {key: tuple(shape) for key, shape in FACTS_SD3["mmdit"]["sd3-medium"].items()}
    with pytest.raises(ValueError, match=r"y_embedder\.mlp\.0\.weight is missing; use a complete SD3"):
        read_config({key: shape for key, shape in keys.items() if "y_embedder" not in key})
    with pytest.raises(ValueError, match=r"its joint_blocks are numbered \[0, 2, 3"):
        read_config({key: shape for key, shape in keys.items() if not key.startswith("joint_blocks.1.")})


# Names and shapes of full-size transformers and text encoders, in files and adapters, as in diffusers.

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
