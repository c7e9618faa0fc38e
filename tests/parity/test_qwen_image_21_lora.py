"""Saved Qwen-Image 2.1 adapters in diffusers' own loader and transformer, and files of other trainers in ours."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.qwen_image_21.adapter_names import NAMES
from networks import dylora, lokr, lora, lora_fa, lora_qwen_image_21
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.parity.test_qwen_image_21_model import inputs, oracle, oracle_output
from tests.tiny.qwen_image_21 import build_tiny_qwen_image_21, tiny_qwen_image_21, with_fused_gates
from tests.tolerances import FLOAT32_DEEP
from tests.unit.architectures.qwen_image_21.test_load import opened
from tools import convert_lora, merge_lora

DOORS = {"lora_qwen_image_21": lora_qwen_image_21, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}
EVERYWHERE = {"in_dims": "[2,2,2,2]"}


def values() -> list[Tensor]:
    return [value.detach() for value in inputs(4, 6)]


def trained_file(door: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; gives the prediction without and with it."""
    ours = tiny_qwen_image_21(7)
    return save_trained(door, path, arguments, ours, lambda: ours(*values()))


def prediction_with(path: Path, door: Any = lora_qwen_image_21) -> Tensor:
    """Ours with an adapter file merged."""
    ours = tiny_qwen_image_21(7)
    network, weights = door.create_network_from_weights(1.0, str(path), None, [], ours, for_inference=True)
    network.merge_to([], ours, weights, torch.float32, "cpu")
    return ours(*values())  # type: ignore[no-any-return]


def diffusers_prediction(path: Path, caplog: pytest.LogCaptureFixture) -> Tensor:
    """diffusers' with a file as it is; it logs what it does not use."""
    from diffusers import QwenImage21Pipeline

    theirs = oracle(tiny_qwen_image_21(7))
    with caplog.at_level(logging.WARNING, "diffusers"):
        QwenImage21Pipeline.load_lora_into_transformer(QwenImage21Pipeline.lora_state_dict(str(path)), theirs)
    assert "unexpected" not in caplog.text and "Unsupported" not in caplog.text
    return oracle_output(theirs, *values())


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("lora_qwen_image_21", {}),
        ("lora_qwen_image_21", EVERYWHERE),
        ("lora", {"attn_dim": "0"}),
        ("lora_fa", EVERYWHERE),
        ("dylora", {"unit": "2"}),
    ],
    ids=str,
)
def test_diffusers_loads_our_file_as_it_is(
    door: str, arguments: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ours.safetensors"
    base, expected = trained_file(DOORS[door], path, arguments)
    assert (expected - base).abs().max() > 0.01
    tensors = load_file(path)
    endings = (".lora_A.weight", ".lora_B.weight")
    assert all(key.startswith("diffusion_model.") and key.endswith(endings) for key in tensors)
    assert "diffusion_model.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight" in tensors
    torch.testing.assert_close(diffusers_prediction(path, caplog), expected, **FLOAT32_DEEP)
    torch.testing.assert_close(prediction_with(path), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize(
    ("door", "arguments"), [(lokr, {"factor": "2"}), (lora_qwen_image_21, {"dora_wd": "True"})], ids=["lokr", "dora"]
)
def test_other_kinds_have_the_names_of_kohya(door: Any, arguments: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    _, expected = trained_file(door, path, arguments)
    assert any(key.startswith("lora_unet_transformer_blocks_0_attn_to_q.") for key in load_file(path))
    torch.testing.assert_close(prediction_with(path, door), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize(
    ("down", "up", "stem"),
    [
        ("lora_down", "lora_up", lambda path: f"lora_unet_{path.replace('.', '_')}"),  # musubi-tuner
        ("lora_A", "lora_B", lambda path: f"diffusion_model.{path}"),  # ai-toolkit
        ("lora_A", "lora_B", lambda path: f"transformer.{path}"),  # OneTrainer, SimpleTuner
    ],
    ids=["musubi-tuner", "ai-toolkit", "SimpleTuner"],
)
def test_files_of_other_trainers_act_as_they_say(down: str, up: str, stem: Any, tmp_path: Path) -> None:
    model, tensors = tiny_qwen_image_21(7), {}
    generator = torch.Generator().manual_seed(11)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path.startswith("transformer_blocks."):
            first = torch.randn(2, layer.in_features, generator=generator) / layer.in_features**0.5
            second = 0.3 * torch.randn(layer.out_features, 2, generator=generator)
            tensors |= {f"{stem(path)}.{down}.weight": first, f"{stem(path)}.{up}.weight": second}
            if down == "lora_down":
                tensors[f"{stem(path)}.alpha"] = torch.tensor(1.0)
            layer.weight += (0.5 if down == "lora_down" else 1.0) * second @ first
    save_file(tensors, tmp_path / "theirs.safetensors")
    torch.testing.assert_close(prediction_with(tmp_path / "theirs.safetensors"), model(*values()), **FLOAT32_DEEP)


@pytest.mark.parametrize("naming", ["kohya", "generic", "diffusers"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_the_merged_checkpoint_computes_what_the_adapter_did(tmp_path: Path, naming: Any, is_fused: bool) -> None:
    """Also where ComfyUI's file fuses two of the layers."""
    arguments = build_tiny_qwen_image_21(tmp_path, 33)
    if is_fused:
        save_file(with_fused_gates(load_file(arguments[1])), arguments[1])
    denoiser = opened(arguments).denoiser()
    lora_path = tmp_path / "lora.safetensors"
    base, expected = save_trained(lora_qwen_image_21, lora_path, EVERYWHERE, denoiser, lambda: denoiser(*values()))
    assert (expected - base).abs().max() > 0.01
    save_adapter_file(tmp_path / "renamed.safetensors", rename(read_adapter_file(lora_path), NAMES, naming).file)
    merged = tmp_path / "merged.safetensors"
    words = ["--sd_model", arguments[1], "--models", str(tmp_path / "renamed.safetensors"), "--save_to", str(merged)]
    assert merge_lora.main(words) == 0
    assert load_file(merged).keys() == load_file(arguments[1]).keys()
    found = opened([arguments[0], str(merged), *arguments[2:]]).denoiser()
    torch.testing.assert_close(found(*values()), expected, **FLOAT32_DEEP)


def test_the_command_converts_into_every_naming(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    trained_file(lora_qwen_image_21, path, {})
    for naming, key in (
        ("kohya", "lora_unet_transformer_blocks_0_img_mlp_gate_layer.lora_down.weight"),
        ("generic", "diffusion_model.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight"),
        ("diffusers", "transformer.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight"),
    ):
        out = tmp_path / f"{naming}.safetensors"
        assert convert_lora.main(["--model", str(path), "--save_to", str(out), "--to", naming]) == 0
        assert key in {name for module in read_adapter_file(out).modules.values() for name in module.keys.values()}
