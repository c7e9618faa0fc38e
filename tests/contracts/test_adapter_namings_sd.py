"""Adapter names of Stable Diffusion 1.x against those of the full-size checkpoint and of known adapter files."""

import pytest

from library.architectures.sd.layers import NAMES
from tests.recognising import base_of
from tests.tiny.sd import full_size_keys

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
