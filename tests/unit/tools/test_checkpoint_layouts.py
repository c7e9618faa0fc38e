"""tools/convert_diffusers_to_flux.py and tools/merge_sd3_safetensors.py, run as commands on tiny models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.flux.reference import diffusers_state
from library.checkpoints.files import load_state_dict
from tests.tiny.flux import CONFIG, build_tiny_flux, tiny_flux
from tests.tiny.sd3 import build_tiny_sd3
from tools import convert_diffusers_to_flux, merge_sd3_safetensors


def convert(*arguments: object) -> int:
    return convert_diffusers_to_flux.main([str(argument) for argument in arguments])


def merge(*arguments: object) -> int:
    return merge_sd3_safetensors.main([str(argument) for argument in arguments])


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """Build the files of a tiny SD3: the transformer with its VAE in one file, the text encoders in others."""
    dit = build_tiny_sd3(tmp_path / "sd3", 31, with_text=False)
    return {"dit": dit, **{name: tmp_path / "sd3" / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl")}}


def arguments_for(parts: dict[str, Path]) -> list[str]:
    return [word for name, path in parts.items() for word in (f"--{name}", str(path))]


@pytest.mark.parametrize("form", ["folder", "transformer", "file"])
def test_a_diffusers_flux_transformer_gets_the_original_key_names(tmp_path: Path, form: str) -> None:
    build_tiny_flux(tmp_path / "files", 33)
    build_tiny_flux(tmp_path / "folder", 33, "diffusers")
    path = {"folder": "", "transformer": "transformer", "file": "transformer/diffusion_pytorch_model.safetensors"}[form]
    out = tmp_path / "flux.safetensors"
    assert convert("--diffusers_path", tmp_path / "folder" / path, "--save_to", out, "--mem_eff_load_save") == 0
    actual, expected = load_state_dict(out), load_state_dict(tmp_path / "files" / "flux1.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_shards_are_read_from_the_first_file_on_and_cast(tmp_path: Path) -> None:
    state = diffusers_state(tiny_flux(34).state_dict(), CONFIG)
    names, stem = list(state), "diffusion_pytorch_model"
    shards = {f"{stem}-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / shard)
    first = tmp_path / f"{stem}-00001-of-00003.safetensors"
    arguments = ("--diffusers_path", first, "--save_to", tmp_path / "f.safetensors", "--save_precision", "bf16")
    assert convert(*arguments) == 0
    actual, expected = load_state_dict(tmp_path / "f.safetensors"), tiny_flux(34).state_dict()
    assert all(torch.equal(actual[key], tensor.bfloat16()) for key, tensor in expected.items())


def test_anything_but_a_diffusers_transformer_is_refused(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny_flux(tmp_path / "files", 35)
    out = tmp_path / "out.safetensors"
    unet = tiny_sd_folder / "unet" / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "files" / "flux1.safetensors", unet):
        assert convert("--diffusers_path", path, "--save_to", out) == 1
        assert "is not a FLUX.1 transformer in diffusers' layout" in capsys.readouterr().err
    assert convert("--diffusers_path", unet, "--save_to", tmp_path / "out.ckpt") == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert not out.exists()


def test_the_parts_of_sd3_are_merged_into_one_file(tmp_path: Path, parts: dict[str, Path]) -> None:
    expected = load_state_dict(build_tiny_sd3(tmp_path / "whole", 31))
    assert merge(*arguments_for(parts), "--output", tmp_path / "all.safetensors", "--device", "cpu") == 0
    actual = load_state_dict(tmp_path / "all.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_eight_bit_weights_keep_their_scales_unless_they_are_decoded(tmp_path: Path, parts: dict[str, Path]) -> None:
    t5, name = load_state_dict(parts["t5xxl"]), "encoder.block.0.layer.0.SelfAttention.q"
    codes, scale = (t5[f"{name}.weight"] / 0.25).to(torch.float8_e4m3fn), torch.tensor([0.25])
    marked = {**t5, f"{name}.weight": codes, f"{name}.scale_weight": scale, "scaled_fp8": codes[:0, 0].clone()}
    save_file(marked, parts["t5xxl"])
    prefix, out = "text_encoders.t5xxl.transformer.", tmp_path / "all.safetensors"
    assert merge(*arguments_for(parts), "--output", out) == 0
    actual = load_state_dict(out)
    assert torch.equal(actual[f"{prefix}{name}.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(actual[f"{prefix}{name}.scale_weight"], scale)
    assert merge(*arguments_for(parts), "--output", out, "--save_precision", "fp32") == 0
    actual = load_state_dict(out)
    assert torch.equal(actual[f"{prefix}{name}.weight"], codes.float() * 0.25)
    assert not any("scale" in key for key in actual)


def test_a_part_with_its_own_option_replaces_the_one_in_another_file(
    tmp_path: Path, parts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    vae = {key: tensor + 1 for key, tensor in load_state_dict(tmp_path / "sd3" / "vae.safetensors").items()}
    save_file(vae, tmp_path / "vae.safetensors")
    out = tmp_path / "all.safetensors"
    assert merge(*arguments_for({**parts, "vae": tmp_path / "vae.safetensors"}), "--output", out) == 0
    assert "--vae replaces the same part" in caplog.text
    actual = load_state_dict(out)
    assert all(torch.equal(actual[f"first_stage_model.{key}"], tensor) for key, tensor in vae.items())


def test_parts_of_other_models_are_named(
    tmp_path: Path, parts: dict[str, Path], tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers_vae = tiny_sd_folder / "vae" / "diffusion_pytorch_model.safetensors"
    flux = Path(build_tiny_flux(tmp_path / "flux", 36)[1])
    wrong = (
        ({"clip_l": parts["clip_g"], "clip_g": parts["clip_l"]}, "not swapped"),
        ({"dit": flux}, "--dit"),
        ({"dit": parts["clip_l"]}, "has no joint_blocks"),
        ({"vae": diffusers_vae}, "is not a VAE in the original layout"),
        ({"t5xxl": tmp_path / "none.safetensors"}, "--t5xxl"),
    )
    for other, message in wrong:
        assert merge(*arguments_for({**parts, **other}), "--output", tmp_path / "no.safetensors") == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
