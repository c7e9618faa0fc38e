"""Recognition of an adapter file's base model from a few of its keys."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.architectures.specs import list_specs
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.recognition import keys_of_text_encoders, require_spec
from library.checkpoints.saving import save_safetensors
from library.commands import adapter_files
from library.models.identify import find_spec
from networks.core.files.adapter_file import parse_adapter
from networks.core.files.foreign_names import add_model
from tests.recognising import base_of

ATTN2 = "transformer_blocks_0_attn2_to_k.lora_down.weight"
# The naming of older diffusers versions.
OLD_DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight"

CASES = [
    ("sd1", "lora_unet_down_blocks_0_attentions_0_" + ATTN2, (4, 768)),
    ("sd1", "lora_unet_input_blocks_1_1_" + ATTN2, (4, 768)),
    ("sd1", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (4, 768)),
    ("sd1", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_A.weight", (4, 768)),
    ("sd1", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", (4, 768)),
    ("sd1", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", (4, 768)),
    ("sd2", "lora_unet_down_blocks_0_attentions_0_" + ATTN2, (4, 1024)),
    ("sd2", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (4, 1024)),
    ("sd2", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight", (4, 1024)),
    ("sdxl", "lora_unet_input_blocks_4_1_" + ATTN2, (4, 2048)),
    ("sd1", OLD_DIFFUSERS, (4, 768)),
    ("sd2", f"unet.{OLD_DIFFUSERS}", (4, 1024)),
    ("sdxl", OLD_DIFFUSERS, (4, 2048)),
    ("sdxl", f"unet.{OLD_DIFFUSERS}", (4, 2048)),
    ("sdxl", "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q.lora_down.weight", (4, 1280)),
    ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (4, 1280)),
    ("sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight", (4, 640)),
    ("sdxl", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", (4, 1280)),
    ("sd1", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.oft_R.weight", (24, 496)),
    ("sd1", "oft_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.oft_blocks", (4, 80, 80)),
    ("sd2", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.oft_R.weight", (32, 496)),
    ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.boft_R", (2, 256, 8, 8)),
    ("hunyuan_image", "lora_unet_double_blocks_0_img_attn_qkv.oft_R.weight", (112, 496)),
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (4, 3072)),
    ("flux", "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight", (4, 3072)),
    ("flux", "diffusion_model.single_blocks.0.linear1.lora_A.weight", (4, 3072)),
    ("flux", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 3072)),
    ("flux", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 3072)),
    ("sd3", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 1536)),
    ("sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", (4, 1536)),
    ("lumina", "lora_unet_layers_0_attention_qkv.lora_down.weight", (4, 2304)),
    ("lumina", "diffusion_model.noise_refiner.0.attention.qkv.lora_A.weight", (4, 2304)),
    ("hunyuan_image", "lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight", (4, 3584)),
    ("hunyuan_image", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (4, 3584)),
    ("anima", "lora_unet_blocks_0_cross_attn_q_proj.lora_down.weight", (4, 2048)),
    ("anima", "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj.lora_A.weight", (4, 1024)),
    ("anima", "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", (4, 2048)),
    ("anima", "text_conditioner.blocks.0.self_attn.q_proj.lora_A.weight", (4, 1024)),
    ("sd3", "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight", (4, 1536)),
    (None, "lora_te_layers_0_self_attn_q_proj.lora_down.weight", (4, 1024)),
    (None, "something.else", (4, 4)),
]


@pytest.mark.parametrize(("base", "key", "shape"), CASES, ids=[f"{base}: {key}" for base, key, _ in CASES])
def test_the_base_model_is_recognised_from_one_key(base: str | None, key: str, shape: tuple[int, ...]) -> None:
    assert base_of({key: shape}) == base


def test_the_error_for_an_unknown_base_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"x\.safetensors: its base model .*Anima, FLUX\.1, .*Diffusion 1\.x"):
        require_spec(list_specs(), {"something.else": (4, 4)}, {}, "x.safetensors")


def test_every_recognised_file_gets_the_spec_of_its_base_model() -> None:
    for base, key, shape in CASES:
        if base is not None:
            assert require_spec(list_specs(), {key: shape}, {}, "x").name == base


LAYER = "encoder.layers.0.mlp.fc1"
TEXT_ENCODER_NAMES = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    f"text_encoder.text_model.{LAYER}", f"text_encoder_2.{LAYER}", f"clip_g.text_model.{LAYER}",
    f"text_encoders.clip_l.transformer.text_model.{LAYER}", "t5.encoder.block.0.layer.0.SelfAttention.q",
    f"base_model.model.text_model.{LAYER}", f"base_model.model.{LAYER}", f"text_encoder.base_model.model.{LAYER}",
    "lycoris_text_model_encoder_layers_0_mlp_fc1", f"text_model.{LAYER}",
)  # fmt: skip
DENOISER_NAMES = (
    "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in", "net.blocks.0.self_attn.q_proj",
    "lora_transformer_transformer_blocks_0_attn_to_q", "transformer.context_embedder", "lora_unet_txt_in",
    "base_model.model.transformer_blocks.0.attn.to_q", "text_conditioner.blocks.0.self_attn.q_proj",
    "lycoris_context_refiner_0_attn_to_q", "diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.fc1",
)  # fmt: skip


@pytest.mark.parametrize("name", [*TEXT_ENCODER_NAMES, *DENOISER_NAMES])
def test_text_encoder_keys_are_recognised_in_every_naming(name: str, tmp_path: Path) -> None:
    """PEFT folders count too: text encoder outputs must not be cached before --base_weights have been merged."""
    key = f"{name}.lora_A.weight"
    save_safetensors(tmp_path / "adapter_model.safetensors", {key: torch.ones(2, 3)})
    expected = [key] if name in TEXT_ENCODER_NAMES else []
    assert keys_of_text_encoders(tmp_path) == keys_of_text_encoders(tmp_path / "adapter_model.safetensors") == expected


def test_attention_processor_keys_are_converted_to_lora_keys() -> None:
    down, up = torch.ones(4, 768), torch.ones(320, 4)
    file = parse_adapter(
        {OLD_DIFFUSERS: down, OLD_DIFFUSERS.replace("down.weight", "up.weight"): up}, {}, "old.safetensors"
    )
    (module,) = add_model(file, [spec.names for spec in list_specs()]).modules.values()
    assert module.name == f"unet.{OLD_DIFFUSERS.partition('.processor')[0]}.to_k"
    assert set(module.keys.values()) == {f"{module.name}.lora_down.weight", f"{module.name}.lora_up.weight"}


def test_a_fused_layer_of_another_model_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1 has a layer that programs fuse for this made-up model with names and signs like FLUX.1's."""
    flux = find_spec(list_specs(), "flux")
    fused = "double_blocks.0.img_attn.qkv"
    parts = tuple(
        ModuleNames(
            f"lora_unet_double_blocks_0_img_attn_{n}",
            f"diffusion_model.double_blocks.0.img_attn.{n}",
            f"transformer.x.0.{n}",
        )
        for n in ("to_q", "to_k", "to_v")
    )
    names = BaseNames(
        "knots", parts, fused=((".img_attn.qkv", (".img_attn.to_q", ".img_attn.to_k", ".img_attn.to_v")),)
    )
    knots = replace(flux, name="knots", names=names, version="knots")
    tensors = {
        f"lora_unet_{fused.replace('.', '_')}.lora_down.weight": torch.ones(2, 3072),
        f"lora_unet_{fused.replace('.', '_')}.lora_up.weight": torch.ones(9216, 2),
    }
    save_safetensors(tmp_path / "flux.safetensors", tensors, {})
    monkeypatch.setattr(adapter_files, "list_specs", lambda: (knots, *list_specs()))
    file = adapter_files.read_adapter(tmp_path / "flux.safetensors", "--model")
    assert list(file.modules) == [f"lora_unet_{fused.replace('.', '_')}"]
    assert adapter_files.spec_for_file(file, "x").name == "flux"
