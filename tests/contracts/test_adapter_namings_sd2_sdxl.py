"""The tables of module names of Stable Diffusion 2.x and XL against the models themselves, at full size."""

import pytest

from library.architectures.sd.layers import SD2_NAMES
from library.architectures.sdxl.layers import NAMES
from library.models.clip.clip import clip_from_any
from library.models.unet.checkpoint_keys import UNET_PREFIX
from tests.contracts.full_size import facts, parts
from tests.recognising import base_of

TABLES = {"sd21": SD2_NAMES, "sdxl": NAMES}


def stems(model: str, part: str) -> set[str]:
    """Return the diffusers and transformers paths of modules with a weight, except embeddings and projections."""
    names = {clip_from_any(name) for name in parts(model)[part].weights.shapes}
    left_out = ("embeddings.", "text_projection")
    return {n.removesuffix(".weight") for n in names if n.endswith(".weight") and not n.startswith(left_out)}


@pytest.mark.parametrize("model", TABLES)
def test_the_table_has_every_module_of_the_unet_and_no_other(model: str) -> None:
    paths = {n.diffusers for n in TABLES[model].modules if isinstance(n.diffusers, str)}
    assert {p.removeprefix("unet.") for p in paths if p.startswith("unet.")} == stems(model, "unet")


@pytest.mark.parametrize("model", TABLES)
def test_the_table_has_every_module_of_the_text_encoders_and_no_other(model: str) -> None:
    for part in (p for p in parts(model) if p.startswith("text_encoder")):
        start = f"{part}.text_model."
        actual = {n.diffusers.removeprefix(start) for n in TABLES[model].modules if str(n.diffusers).startswith(start)}
        assert actual == stems(model, part)


@pytest.mark.parametrize("model", TABLES)
def test_generic_names_are_the_paths_in_the_checkpoint(model: str) -> None:
    """ComfyUI reads "diffusion_model." followed by the path in the checkpoint."""
    ldm = {name.removeprefix(UNET_PREFIX) for name in facts(model)["checkpoint"] if name.startswith(UNET_PREFIX)}
    generic = {
        n.generic.removeprefix("diffusion_model.") for n in TABLES[model].modules if ".text_model." not in n.generic
    }
    assert generic == {name.removesuffix(".weight") for name in ldm if name.endswith(".weight")}


@pytest.mark.parametrize(("model", "base"), [("sd21", "sd2"), ("sdxl", "sdxl")])
def test_every_key_of_a_kohya_file_is_found_and_identifies_the_base_model(model: str, base: str) -> None:
    content = facts(f"lora_keys_{model}")["networks.lora"]
    keys = {**content["default"], **content["variants"]["conv_dim=8"]["added"]}
    for key in keys:
        module = key.partition(".")[0]
        actual = TABLES[model].find(module)
        assert actual is not None and actual.kohya == module
    assert base_of(keys) == base


def test_omi_names_distinguish_sdxls_text_encoders() -> None:
    for name, kohya in (
        (
            "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        ("clip_l.text_model.encoder.layers.3.mlp.fc1", "lora_te1_text_model_encoder_layers_3_mlp_fc1"),
        ("clip_g.text_model.encoder.layers.3.mlp.fc1", "lora_te2_text_model_encoder_layers_3_mlp_fc1"),
    ):
        actual = TABLES["sdxl"].find(name)
        assert actual is not None and actual.kohya == kohya
