"""Names of layers in adapter files of Stable Diffusion 1.x to 3, in every naming."""

import re

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd.layers import NAMES, view
from library.architectures.sd3.layers import NAMES as SD3_NAMES
from library.architectures.sd3.model import MMDiTConfig
from library.checkpoints.adapter_names import ModuleNames
from library.models.clip.clip import empty_clip
from library.models.unet.unet import empty_unet
from networks.core.targets.targets import TargetModule, find_target_modules
from tests.contracts.test_base_keys import module_parts as parts
from tests.recognising import base_of
from tests.tiny.sd import full_size_keys
from tests.tiny.sd3 import CONFIGS, mmdit_weights
from tests.tiny.sd3 import full_size_keys as sd3_keys


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """Return the full-size model as network modules see it, on the meta device."""
    components = parts()
    clip, unet = empty_clip(components["text_encoder"].config), empty_unet(components["unet"].config)
    text_view, unet_view = view([clip], unet)
    assert isinstance(text_view, nn.Module)
    return text_view, unet_view


def sites_of(
    models: tuple[nn.Module, nn.Module], with_conv: bool = False
) -> tuple[list[TargetModule], list[TargetModule]]:
    text_view, unet = models
    targets = unet.adapter_targets
    (text,) = targets.text_encoders
    classes = targets.denoiser.blocks + (targets.denoiser.conv_blocks if with_conv else ())
    return find_target_modules(text, text_view, text.blocks), find_target_modules(targets.denoiser, unet, classes)


def test_every_unet_layer_belongs_to_one_of_the_25_blocks(models):
    block_list = models[1].adapter_targets.block_list
    assert (len(block_list.patterns), block_list.down, block_list.mid, block_list.up) == (25, 12, 1, 12)
    counts = [0] * 25
    for site in sites_of(models, with_conv=True)[1]:
        matches = [i for i, p in enumerate(block_list.patterns) if p and re.search(p, site.path)]
        assert len(matches) == 1, site.path
        counts[matches[0]] += 1
    down, up = [15, 15, 1, 16, 15, 1, 16, 15, 1, 3, 3], [4, 4, 5, 16, 16, 17, 16, 16, 17, 16, 16, 16]
    assert counts == [0, *down, 18, *up]


def test_the_view_shares_its_layers_with_the_model(models):
    text_view, _ = models
    layer = text_view.text_model.encoder.layers[3].mlp.fc1
    assert dict(text_view.named_modules())["text_model.encoder.layers.3.mlp.fc1"] is layer


# Adapter names of Stable Diffusion 1.x against those of the full-size checkpoint and of known adapter files.

FACTS = full_size_keys()


def stems(names: dict[str, str]) -> dict[str, str]:
    """Map module paths to their names in the checkpoint, without .weight and .bias."""
    return {path.rpartition(".")[0]: name.rpartition(".")[0] for path, name in names.items()}


def test_the_unet_table_has_every_module_with_weights_and_its_original_path() -> None:
    expected = {
        f"unet.{path}": name.replace("model.diffusion_model.", "diffusion_model.")
        for path, name in stems(FACTS["diffusers"]["unet"]).items()
    }
    ours = {m.diffusers: m.generic for m in NAMES.modules if m.kohya.startswith("lora_unet_")}
    assert ours == expected


def test_the_text_encoder_table_has_every_module_but_the_embeddings() -> None:
    expected = {
        f"text_encoder.{path}": name.replace("cond_stage_model.transformer.", "text_encoders.clip_l.transformer.")
        for path, name in stems(FACTS["diffusers"]["text_encoder"]).items()
        if ".embeddings." not in path
    }
    ours = {m.diffusers: m.generic for m in NAMES.modules if m.kohya.startswith("lora_te_")}
    assert ours == expected


def test_kohya_names_match_known_files() -> None:
    in_files = {key.partition(".")[0] for key in FACTS["lora"]}
    assert len(in_files) == 264
    assert in_files <= {module.kohya for module in NAMES.modules}


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_q",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q",
        "base_model.model.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
    ],
)
def test_spellings_of_other_trainers_are_found(name: str) -> None:
    module = NAMES.find(name)
    assert module is not None
    assert module.kohya == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"


def test_a_text_encoder_path_without_text_model_is_found() -> None:
    module = NAMES.find("text_encoder.encoder.layers.11.mlp.fc2")
    assert module is not None and module.kohya == "lora_te_text_model_encoder_layers_11_mlp_fc2"


def test_names_of_omi_are_found() -> None:
    """OMI names are Kohya's paths with dots, after prefixes that OneTrainer and sd-scripts' OFT read."""
    for module in NAMES.modules:
        for prefix, other in (("lora_unet_", "unet_"), ("lora_te_", "clip_l_"), ("lora_unet_", "oft_unet_")):
            if module.kohya.startswith(prefix):
                assert NAMES.find(module.kohya.replace(prefix, other, 1)) is module
    text_module = NAMES.find("clip_l.text_model.encoder.layers.11.mlp.fc2")
    assert text_module is not None and text_module.kohya == "lora_te_text_model_encoder_layers_11_mlp_fc2"


def test_the_full_size_file_is_recognised() -> None:
    assert base_of(FACTS["lora"]) == "sd1"
    assert base_of({k: s for k, s in FACTS["lora"].items() if k.startswith("lora_te_")}) == "sd1"


# Adapter names of Stable Diffusion 3 against full-size checkpoints, known adapter files and diffusers' own reader.

SD3_FACTS = sd3_keys()
BY_GENERIC = {module.generic: module for module in SD3_NAMES.modules}


@pytest.mark.parametrize("name", SD3_FACTS["mmdit"])
def test_every_layer_of_the_denoiser_has_a_name(name: str) -> None:
    layers = {key.removesuffix(".weight") for key, shape in SD3_FACTS["mmdit"][name].items() if key.endswith(".weight")}
    norms = {layer for layer in layers if layer.endswith((".ln_q", ".ln_k"))}
    assert {f"diffusion_model.{layer}" for layer in layers - norms} <= BY_GENERIC.keys()


def convert_to_diffusers(module: ModuleNames, weight: Tensor) -> dict[str, Tensor]:
    """Return the diffusers tensors of a fused weight."""
    if module.pieces:
        parts = weight.chunk(len(module.pieces))
        return {piece.diffusers: part for piece, part in zip(module.pieces, parts, strict=True)}
    assert isinstance(module.diffusers, str)
    is_pair = module.swaps_pair and weight.shape[0] == 2 * weight.shape[1]
    return {module.diffusers: weight.roll(weight.shape[0] // 2, 0) if is_pair else weight}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_map_to_the_same_place_as_in_diffusers(config: MMDiTConfig) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    weights = mmdit_weights(config, 77)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    ours: dict[str, Tensor] = {}
    for key, weight in weights.items():
        stem = key.removesuffix(".weight")
        if f"diffusion_model.{stem}" in BY_GENERIC and key.endswith(".weight"):
            ours |= convert_to_diffusers(BY_GENERIC[f"diffusion_model.{stem}"], weight)
    expected = {
        f"transformer.{key.removesuffix('.weight')}": tensor
        for key, tensor in theirs.items()
        if key.endswith(".weight") and ".norm_" not in key.replace(".norm_out", "")
    }
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
