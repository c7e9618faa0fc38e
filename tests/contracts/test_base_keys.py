"""The names and shapes of full-size checkpoints are a contract: 1130 of Stable Diffusion 1.5, in both layouts."""

import torch

from library.architectures.sd.load import CLIP_PREFIXES, single_file_parts
from library.checkpoints.weights import Weights
from library.models.clip.clip import clip_body, empty_clip
from library.models.loading import Component, is_same_matrix
from library.models.unet.unet import empty_unet
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_from_ldm, vae_to_ldm
from library.models.vae.vae import empty_vae, vae_of_checkpoint
from library.options.model import BASE_FLAG
from tests.tiny.sd import full_size_keys

FACTS = full_size_keys()


def checkpoint() -> Weights:
    """Return the full-size checkpoint with its tensors on the meta device."""
    sizes = {name: tuple(shape) for name, shape in FACTS["checkpoint"].items()}
    return Weights("sd15", sizes, lambda name: torch.empty(sizes[name], device="meta"))


def parts() -> dict[str, Component]:
    return {**single_file_parts(BASE_FLAG, checkpoint(), "sd1"), "vae": vae_of_checkpoint(BASE_FLAG, checkpoint())}


def test_vae_names_survive_a_round_trip():
    for path, name in FACTS["diffusers"]["vae"].items():
        ldm = name.removeprefix(VAE_PREFIX)
        assert (vae_from_ldm(ldm, 4), vae_to_ldm(path, 4)) == (path, ldm)


def test_every_text_encoder_name_only_loses_its_prefix():
    for path, name in FACTS["diffusers"]["text_encoder"].items():
        assert name == CLIP_PREFIXES["sd1"] + path


def test_the_unet_config_is_inferred_from_shapes():
    config = parts()["unet"].config
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
    config = parts()["vae"].config
    assert config["block_out_channels"] == (128, 256, 512, 512)
    assert (config["layers_per_block"], config["latent_channels"], config["norm_num_groups"]) == (2, 4, 32)
    assert config["use_quant_conv"] and config["use_post_quant_conv"]


def test_the_text_encoder_config_is_inferred_from_shapes():
    config = parts()["text_encoder"].config
    wanted = {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted


def test_the_modules_have_exactly_the_weights_of_the_checkpoint():
    components = parts()
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
