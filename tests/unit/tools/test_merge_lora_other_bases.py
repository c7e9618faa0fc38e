"""Merging into, and extracting from, checkpoints of Stable Diffusion 2.x and XL: files and folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.architectures.sd.assembly import build as build_sd
from library.architectures.sdxl.assembly import build as build_sdxl
from library.architectures.sdxl.options import SdxlOptions
from library.checkpoints.headers import read_metadata
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from networks.lora import create_network
from tools.extract_lora_from_models import main as extract
from tools.merge_lora import main as merge

pytestmark = pytest.mark.slow

SLOW_FOLDER = pytest.param("tiny_sdxl_folder", marks=pytest.mark.nightly)  # a folder and a file of SD 2.x


def models_of(path: Path, is_sdxl: bool) -> tuple[list[nn.Module], nn.Module, Any]:
    """Return (text encoders, U-Net, both as network modules see them)."""
    model = ModelOptions(pretrained_model_name_or_path=str(path), v2=not is_sdxl)
    arch = build_sdxl(SdxlOptions(model=model)) if is_sdxl else build_sd(TrainOptions(model=model))
    encoders, unet = arch.load.text_encoders(), arch.load.denoiser()
    return encoders, unet, arch.view(encoders, unet)


def random_lora(path: Path, is_sdxl: bool, to: Path, rank: int = 4) -> Path:
    view_of_models = models_of(path, is_sdxl)[2]
    network = create_network(1.0, rank, 2.0, None, *view_of_models, conv_dim=str(rank))
    generator = torch.Generator().manual_seed(91)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.save_weights(str(to), None, {})
    return to


def copy_path(path: Path, folder: Path, name: str) -> Path:
    """Return the path for a changed copy: a folder for a folder, or a file next to its tokenizer for a file."""
    if path.is_dir():
        return folder / name
    (folder / name).mkdir()
    (folder / name / "tokenizer").symlink_to(path.parent / "tokenizer")
    return folder / name / "model.safetensors"


@pytest.mark.parametrize("name", ["tiny_sd2_file", "tiny_sdxl_file", SLOW_FOLDER])
def test_a_merged_lora_is_extracted_again(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base, is_sdxl = request.getfixturevalue(name), "sdxl" in name
    lora = random_lora(base, is_sdxl, tmp_path / "lora.safetensors", rank=2)
    tuned = copy_path(base, tmp_path, "merged")
    assert merge(["--sd_model", str(base), "--models", str(lora), "--save_to", str(tuned)]) == 0
    out = tmp_path / "out.safetensors"
    arguments = ["--model_org", str(base), "--model_tuned", str(tuned), "--save_to", str(out)]
    assert extract([*arguments, "--dim", "4", "--conv_dim", "4", "--sdxl" if is_sdxl else "--v2"]) == 0
    original, extracted = load_file(lora), load_file(out)
    assert original.keys() == extracted.keys()
    for key in (key for key in original if key.endswith("lora_up.weight")):
        stem = key.removesuffix(".lora_up.weight")
        rank = original[f"{stem}.lora_down.weight"].shape[0]
        expected = float(original[f"{stem}.alpha"]) / rank * product(original, stem)
        # the merged weights are rounded to float32: differences of 1e-7 of weights of size 1
        torch.testing.assert_close(product(extracted, stem), expected, rtol=1e-3, atol=1e-5)
    version = read_metadata(out)["ss_base_model_version"]
    assert version == ("sdxl_base_v1-0" if is_sdxl else "sd_v2")


def product(tensors: dict[str, Tensor], stem: str) -> Tensor:
    return tensors[f"{stem}.lora_up.weight"].flatten(1) @ tensors[f"{stem}.lora_down.weight"].flatten(1)


def test_checkpoints_of_two_base_models_have_no_difference(
    tmp_path: Path, tiny_sd2_file: Path, tiny_sdxl_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_org", str(tiny_sd2_file), "--model_tuned", str(tiny_sdxl_file)]
    assert extract([*arguments, "--save_to", str(tmp_path / "x.safetensors")]) == 1
    error = capsys.readouterr().err
    assert "--model_org is an SD 2.x model, --model_tuned an SDXL model" in error


def test_a_lora_for_another_base_model_is_not_merged(
    tmp_path: Path, tiny_sd2_file: Path, tiny_sdxl_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = random_lora(tiny_sdxl_file, True, tmp_path / "lora.safetensors")
    arguments = ["--sd_model", str(tiny_sd2_file), "--models", str(lora)]
    assert merge([*arguments, "--save_to", str(tmp_path / "x.safetensors")]) == 1
    assert "was it made for another base model?" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
