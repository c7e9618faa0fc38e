"""Files that are not SD 1.x checkpoints are refused with what they are and what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.sd import build_tiny_sd

OTHER_FILES = {
    "sdxl": (["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
             "this is an SDXL checkpoint; use sdxl_train_network.py"),
    "sd3": (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "use sd3_train_network.py"),
    "flux": (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "use flux_train_network.py"),
    "hunyuan": (["byt5_in.fc1.weight", "double_blocks.0.img_attn_qkv.weight"], "use hunyuan_image_train_network.py"),
    "lumina": (["cap_embedder.0.weight", "layers.0.attention.qkv.weight"], "use lumina_train_network.py"),
    "anima": (["net.llm_adapter.embed.weight", "net.blocks.0.x"], "use anima_train_network.py"),
    "sd2": (["cond_stage_model.model.ln_final.weight", "model.diffusion_model.out.0.weight"],
            "this is an SD 2.x checkpoint; add --v2"),
    "lora": (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "an adapter (LoRA), not a base model"),
    "vae": (["encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight"], "this is a VAE, not a base model"),
    "unet": (["down_blocks.0.resnets.0.conv1.weight"], "only the U-Net of a diffusers folder"),
    "text": (["text_model.encoder.layers.0.mlp.fc1.weight"], "only a text encoder"),
    "embedding": (["emb_params"], "a textual inversion embedding"),
    "none": (["thing.weight"], "not a checkpoint of a supported base model (first names: thing.weight)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_the_error_for_another_kind_of_file_says_what_it_is(open_sd, tmp_path, kind):
    names, message = OTHER_FILES[kind]
    save_file({name: torch.randn(2, 2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_sd(tmp_path / "model.safetensors")
    assert "--pretrained_model_name_or_path" in str(error.value) and "model.safetensors" in str(error.value)


def write_changed_copy(tiny_sd_file: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {**load_file(tiny_sd_file), **changes}
    shutil.copytree(tiny_sd_file.parent / "tokenizer", folder / "tokenizer")
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def test_v2_is_refused_for_an_sd1_checkpoint(open_sd, tiny_sd_file, tiny_sd_folder):
    with pytest.raises(ValueError, match=r"this is an SD 1.x checkpoint; remove --v2"):
        open_sd(tiny_sd_file, v2=True)
    with pytest.raises(ValueError, match=r"this is an SD 1.x model; remove --v2"):
        open_sd(tiny_sd_folder, v2=True)


def test_the_error_for_a_checkpoint_without_a_vae_suggests_the_vae_flag(
    open_sd, tiny_sd_file, tiny_sd_folder, tmp_path
):
    dropped = {name: None for name in load_file(tiny_sd_file) if name.startswith("first_stage_model.")}
    path = write_changed_copy(tiny_sd_file, tmp_path, **dropped)
    with pytest.raises(ValueError, match=r"has no VAE .*; use --vae"):
        open_sd(path)
    assert open_sd(path, vae=str(tiny_sd_folder)).load.vae() is not None


def test_a_truncated_safetensors_file_is_refused_by_name(open_sd, tiny_sd_file, tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes(tiny_sd_file.read_bytes()[:500_000])
    with pytest.raises(ValueError, match=r"half.safetensors is not a complete safetensors file: it is truncated"):
        open_sd(path)


def test_a_truncated_ckpt_is_refused_by_name(open_sd, tmp_path):
    path = build_tiny_sd(tmp_path, 14, "ckpt")
    path.write_bytes(path.read_bytes()[:400_000])
    with pytest.raises(ValueError, match=r"--pretrained_model_name_or_path: .*tiny_sd.ckpt"):
        open_sd(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a shopping list: apples, pears and plums\n", "is a text file, not a checkpoint; it begins with 'a shopping"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(range(200)), "cannot be read as a file of plain tensors"),
    ],
)
def test_leftovers_of_failed_downloads_are_recognised(open_sd, tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_sd(tmp_path / "model.safetensors")


class MaliciousPickle:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_with_code_is_refused_and_not_executed(open_sd, tmp_path):
    torch.save({"state_dict": {}, "callback": MaliciousPickle(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"could run code; convert it to .safetensors"):
        open_sd(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("StableDiffusionXLPipeline", "this is an SDXL model; use sdxl_train_network.py"),
        ("FluxPipeline", "this is a FLUX model; use flux_train_network.py"),
        ("StableDiffusion3Pipeline", "this is an SD3 model; use sd3_train_network.py"),
    ],
)
def test_the_error_for_the_folder_of_another_model_says_what_it_is(open_sd, tiny_sd_folder, tmp_path, index, message):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": index}))
    with pytest.raises(ValueError, match=message):
        open_sd(tmp_path)


def test_the_error_for_a_folder_of_checkpoints_suggests_the_file(open_sd, tmp_path):
    (tmp_path / "anything.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not a diffusers folder: .* to use anything.safetensors in it, give"):
        open_sd(tmp_path)


def test_the_error_for_a_folder_without_weights_names_the_expected_file(open_sd, tiny_sd_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"text_encoder has no weights; expected model.safetensors in it"):
        open_sd(folder)


def test_the_error_for_a_mistyped_path_suggests_the_nearest_name(open_sd, tiny_sd_file):
    with pytest.raises(ValueError, match=r"does not exist; did you mean .*tiny_sd.safetensors\?"):
        open_sd(tiny_sd_file.with_name("tinysd.safetensors"))


def test_the_error_for_a_missing_model_names_the_flag(open_sd):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path is missing"):
        open_sd(None)


def test_a_vae_with_16_channels_is_refused(open_sd, tiny_sd_file, tmp_path):
    prefix = "first_stage_model."
    vae = {k: v for k, v in load_file(tiny_sd_file).items() if k.startswith(prefix)}
    vae[f"{prefix}decoder.conv_in.weight"] = torch.randn(16, 16, 3, 3)
    save_file(vae, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"--vae .* has 16 latent channels, but SD 1.x needs 4"):
        open_sd(tiny_sd_file, vae=str(tmp_path / "ae.safetensors"))


def test_a_file_without_a_decoder_is_refused_as_vae(open_sd, tiny_sd_file, tmp_path):
    save_file({"thing": torch.randn(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"--vae .* is not a VAE for SD 1\.x: .*first names: thing"):
        open_sd(tiny_sd_file, vae=str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("clip_skip", [0, 3])
def test_clip_skip_beyond_the_layers_is_refused(open_sd, tiny_sd_file, clip_skip):
    with pytest.raises(ValueError, match=f"--clip_skip is {clip_skip}, but the text encoder has 2 layers; use 1 to 2"):
        open_sd(tiny_sd_file, clip_skip=clip_skip)
