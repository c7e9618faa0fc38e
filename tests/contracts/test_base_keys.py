"""The names and shapes of full-size checkpoints of Stable Diffusion 1.5 to 3 are a contract, in every layout."""

import pytest
import torch

from library.architectures.sd.load import CLIP_PREFIXES, NUM_SD2_LAYERS, single_file_parts
from library.architectures.sd3.model import MMDiT, read_config
from library.architectures.sdxl.load import CLIP_G_PREFIX, CLIP_L_PREFIX
from library.checkpoints.weights import Weights
from library.models.clip.clip import PROJECTION, clip_body, clip_from_any, empty_clip, from_open_clip, open_clip_name
from library.models.loading import Component, is_same_matrix
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_from_ldm, unet_to_ldm
from library.models.unet.unet import empty_unet, unet_layout
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_from_ldm, vae_to_ldm
from library.models.vae.vae import empty_vae, vae_of_checkpoint
from library.options.model import BASE_FLAG
from tests.contracts.full_size import SDXL_LAYOUT, checkpoint, empty_encoders, facts, parts
from tests.tiny.sd import full_size_keys
from tests.tiny.sd3 import full_size_keys as sd3_keys

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
