"""Names and shapes in the published checkpoints of Stable Diffusion 2.1 and XL, at full size and without weights."""

import pytest
import torch

from library.architectures.sd.load import CLIP_PREFIXES, NUM_SD2_LAYERS
from library.architectures.sdxl.load import CLIP_G_PREFIX, CLIP_L_PREFIX
from library.checkpoints.weights import Weights
from library.models.clip.clip import PROJECTION, clip_from_any, from_open_clip, open_clip_name
from library.models.loading import is_same_matrix
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_from_ldm, unet_to_ldm
from library.models.unet.unet import empty_unet, unet_layout
from library.models.vae.vae import empty_vae
from tests.contracts.full_size import SDXL_LAYOUT, checkpoint, empty_encoders, facts, parts

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
def test_the_modules_have_exactly_the_weights_of_the_checkpoint(model, wanted):
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
