"""Folders saved by PEFT are read and merged as PEFT merges them, for every kind that both support."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.core.files.adapter_file import COMPUTED, read_adapter_file, require_layouts
from tests.tolerances import FLOAT32_SAME_MATH
from tools import check_lora_weights

peft = pytest.importorskip("peft")

LAYERS = ["linear", "square", "conv", "narrow", "square_conv"]
ROWS: dict[str, Any] = {"target_modules": LAYERS, "init_lora_weights": False}
OTHERS: dict[str, Any] = {"target_modules": LAYERS, "init_weights": False}
CONFIGS: dict[str, Callable[[], Any]] = {
    "patterns of alternatives": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"conv": 2}, alpha_pattern={"square_conv|narrow": 3}, **ROWS
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **ROWS),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, **OTHERS),
    "LoHa with cores": lambda: peft.LoHaConfig(
        r=4, alpha=6, use_effective_conv2d=True, alpha_pattern={"square": 1}, **OTHERS
    ),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=6, decompose_factor=4, decompose_both=True, **OTHERS),
    "LoKr with cores": lambda: peft.LoKrConfig(r=2, alpha=6, use_effective_conv2d=True, decompose_factor=2, **OTHERS),
    "LoKr of whole matrices": lambda: peft.LoKrConfig(r=16, alpha=8, rank_pattern={"square": 32}, **OTHERS),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=LAYERS, init_weights=False),
}


class Layers(nn.Module):
    """Layers with a square convolution, whose output magnitudes have the shape that others use per input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = nn.Linear(24, 32), nn.Linear(16, 16)
        self.conv, self.narrow = nn.Conv2d(16, 24, 3), nn.Conv2d(16, 24, 1)
        self.square_conv = nn.Conv2d(16, 16, 3)


def save_by_peft(folder: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save a folder with PEFT; return (the weights, the merged weights) by layer name."""
    torch.manual_seed(437)
    model = Layers().requires_grad_(False)
    before = {name: model.get_parameter(f"{name}.weight").clone() for name in LAYERS}
    theirs = peft.get_peft_model(model, CONFIGS[what]())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
            parameter.data *= 1 + 0.5 * torch.rand(parameter.shape) if "magnitude" in name else 1
    theirs.save_pretrained(str(folder))
    merged = theirs.merge_and_unload()
    return before, {name: merged.get_parameter(f"{name}.weight").detach() for name in LAYERS}


@pytest.mark.parametrize("what", CONFIGS)
def test_merged_weights_match_peft(tmp_path: Path, what: str) -> None:
    before, after = save_by_peft(tmp_path, what)
    file = read_adapter_file(tmp_path)
    require_layouts(file, COMPUTED, "merged")
    assert len(file.modules) == len(LAYERS)
    for name, weight in before.items():
        actual = file.modules[f"base_model.model.{name}"].merged(weight, 1.0)
        assert (actual - weight).norm() > 1e-3 * weight.norm()
        torch.testing.assert_close(actual, after[name], **FLOAT32_SAME_MATH)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("beside the file", "patterns of alternatives"),
        ("in its metadata", "patterns of alternatives"),
        ("beside the file", "LoKr of whole matrices"),
    ],
)
def test_the_update_norm_includes_alpha_recorded_outside_the_tensors(
    tmp_path: Path, where: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    before, after = save_by_peft(tmp_path / "saved", what)
    shutil.copytree(tmp_path / "saved", tmp_path / "read")
    if where == "in its metadata":
        settings = json.loads((tmp_path / "read" / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "read" / "adapter_model.safetensors")
        unet_tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in tensors.items()}
        unet_settings = {f"unet.{key}": settings[key] for key in ("r", "lora_alpha", "alpha_pattern", "rank_pattern")}
        save_file(
            unet_tensors,
            tmp_path / "read" / "adapter.safetensors",
            {"lora_adapter_metadata": json.dumps(unet_settings)},
        )
    path = tmp_path / "read" / ("adapter.safetensors" if where == "in its metadata" else "")
    assert check_lora_weights.main([str(path), "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    norms = {module["name"].rpartition(".")[2]: module["update_norm"] for module in modules}
    assert norms == pytest.approx({name: float((after[name] - before[name]).norm()) for name in LAYERS}, rel=1e-4)
