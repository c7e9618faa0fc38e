"""tools/check_lora_weights.py, run as a command."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.relative_change import format_change
from library.checkpoints.saving import save_safetensors
from tests.unit.tools.adapter_files import CONV, LINEAR, tensors, write
from tools.check_lora_weights import format_text, judge, main

ROOT = Path(__file__).parents[3]
TOY = ROOT / "configs" / "quickstart" / "toy_base"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def test_an_intact_file_exits_with_0_and_lists_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", 950)
    assert main(["--model", str(path)]) == 0
    output = capsys.readouterr().out
    assert "9 keys (9 float32), 3 modules, Stable Diffusion 1.x" in output
    assert "all used by ComfyUI, Forge, A1111-style, diffusers, stable-diffusion.cpp" in output
    rows = {line.split()[0]: line.split()[1:4] for line in output.splitlines() if line.startswith("  ")}
    assert rows["down_blocks_0"] == rows["up_blocks_2"] == rows["encoder_layers_3"] == ["1", "4", "2"]


def test_json_has_the_norms_of_the_full_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", 951)
    assert main(["--model", str(path), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    content = tensors(951)
    up, down = content[f"{CONV}.lora_up.weight"].flatten(1), content[f"{CONV}.lora_down.weight"].flatten(1)
    (block,) = [b for b in report["blocks"] if b["block"] == "up_blocks_2"]
    assert block["update_norm"] == pytest.approx(float((0.5 * up.double() @ down.double()).norm()), rel=1e-10)
    assert report["is_usable"] and report["base"] == "sd1" and report["dtypes"] == {"float32": 9}
    assert [p["amount"] for p in report["programs"]] == ["all"] * 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float) -> None:
    broken = tensors(952)[f"{LINEAR}.lora_up.weight"]
    broken[1, 2] = value
    path = write(tmp_path / "a.safetensors", 952, {f"{LINEAR}.lora_up.weight": broken})
    assert main([str(path)]) == 1
    assert f"problem: {LINEAR}.lora_up.weight has 1 of 28 values that are not finite" in capsys.readouterr().out
    assert main([str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["is_usable"] is False


def test_alphas_without_factors_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tensors(954)
    del content[f"{CONV}.lora_down.weight"], content[f"{CONV}.lora_up.weight"]
    save_safetensors(tmp_path / "a.safetensors", content)
    assert main(["--model", str(tmp_path / "a.safetensors")]) == 0
    assert f"warning: alphas without weights, which have no effect: {CONV}.alpha" in capsys.readouterr().out


def test_a_factor_without_its_partner_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tensors(953)
    del content[f"{CONV}.lora_down.weight"]
    save_safetensors(tmp_path / "a.safetensors", content)
    assert main(["--model", str(tmp_path / "a.safetensors")]) == 1
    assert f"{CONV}.lora_up.weight without its down factor" in capsys.readouterr().out


def test_a_file_without_an_adapter_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(tmp_path / "a.safetensors", {"something": torch.ones(2)})
    assert main(["--model", str(tmp_path / "a.safetensors")]) == 1
    assert "no adapter weights (first keys: something)" in capsys.readouterr().out


def test_a_truncated_file_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", 954)
    path.write_bytes(path.read_bytes()[:-8])
    assert main(["--model", str(path)]) == 1
    assert "it is truncated" in capsys.readouterr().err


def test_unusual_but_usable_content_is_a_warning() -> None:
    content = tensors(955) | {
        "bundle_emb.x": torch.ones(1),
        "lora_unet_down_blocks_7_conv.lora_down.weight": torch.ones(1, 2),
        "lora_unet_down_blocks_7_conv.lora_up.weight": torch.zeros(2, 1),
    }
    report = judge(content, {}, "x")
    assert report.problems == []
    assert report.warnings == [
        "keys that belong to no adapter: bundle_emb.x",
        "Stable Diffusion 1.x has no modules of these names: lora_unet_down_blocks_7_conv",
        "all zeros, without effect: lora_unet_down_blocks_7_conv",
    ]


def test_show_all_keys_lists_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "a.safetensors", 956)), "--show_all_keys"]) == 0
    output = capsys.readouterr().out
    assert all(f"{key} float32 {list(t.shape)} norm {float(t.norm()):.4g}" in output for key, t in tensors(956).items())


@pytest.mark.slow
def test_the_old_path_is_the_same_command(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 957)
    done = subprocess.run(
        [sys.executable, "networks/check_lora_weights.py", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 modules, Stable Diffusion 1.x" in done.stdout


def test_the_size_is_said_beside_the_base_models_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One layer of the toy base model changed by a hundredth of its weight."""
    weight = load_file(TOY / "unet" / "diffusion_pytorch_model.safetensors")[LAYER]
    path = tmp_path / "a.safetensors"
    name = f"lora_unet_{LAYER.removesuffix('.weight').replace('.', '_')}"
    save_safetensors(path, {f"{name}.diff": weight * 0.01})
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"|change| is {float(weight.norm()) / 100:.4g}; --base")
    assert main([str(path), "--base_model", str(TOY)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"compared with the base model (1 of 1 modules), {format_change(0.01)}" and "1.00%" in last
    assert main([str(write(tmp_path / "b.safetensors", 958)), "--base_model", str(TOY)]) == 1


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("lora_unet_double_blocks_{i}_img_attn_qkv", ["mora_a", "mora_b"]),  # a kind that nobody knows
        ("diffusion_model.x.{i}.attn", ["lora_up.weight"]),  # every down factor is missing
        ("transformer_blocks.{i}.attn.to_q", ["weight", "bias"]),  # no adapter
        ("lora_unet_double_blocks_{i}_img_mlp_0", [f"kind_{n}" for n in range(60)]),
    ],
)
def test_many_modules_of_an_unknown_kind_take_few_lines(name: str, endings: list[str]) -> None:
    file = {f"{name.format(i=i)}.{ending}": torch.ones(2, 2) for i in range(100) for ending in endings}
    report = judge(file, {}, "a.safetensors")
    assert 4 < len(list(format_text(report))) <= 40
