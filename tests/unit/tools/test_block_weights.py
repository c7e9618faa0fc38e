"""--lbws of the merge commands, checked against a float64 computation from key names alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from library.commands.base_models import find_adapter_targets, open_base_model
from networks import sdxl_merge_lora, svd_merge_lora
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.tools.adapter_files import write as write_small_adapter
from tools import merge_flux_lora, merge_lora

pytestmark = pytest.mark.slow

ORDER = ["BASE", *(f"IN{n:02d}" for n in range(12)), "MID", *(f"OUT{n:02d}" for n in range(12))]
NAMED = {  # the blocks that lists of each length name, as in sd-scripts' documentation
    17: ["BASE", *(f"IN{n:02d}" for n in (1, 2, 4, 5, 7, 8)), "MID", *(f"OUT{n:02d}" for n in range(3, 12))],
    26: ORDER,
    12: ["BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02d}" for n in range(6))],
    20: [name for name in ORDER if not re.fullmatch(r"(IN|OUT)(09|10|11)", name)],
}
LEVEL = re.compile(r"_(down|up)_blocks_(\d)_(resnets|attentions|downsamplers|upsamplers)_(\d)")
NUMBERED = re.compile(r"lora_unet_(input|output)_blocks_(\d+)_")


def block_of(name: str) -> str:
    """Return the block of a key in kohya's format, numbered as in diffusers or as in the single-file layout."""
    if name.startswith("lora_te"):
        return "BASE"
    if match := NUMBERED.match(name):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
    if match := LEVEL.search(name):
        level, part, index = int(match[2]), match[3], int(match[4])
        position = 2 if part.endswith("samplers") else index
        return f"IN{3 * level + position + 1:02d}" if match[1] == "down" else f"OUT{3 * level + position:02d}"
    return "MID" if "_mid" in name else ""


def random_strengths(length: int, seed: int) -> list[float]:
    """Return random strengths, one of which is 0 and one negative."""
    drawn = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round(decimals=3)
    drawn[3], drawn[5] = 0.0, -0.5
    return [float(value) for value in drawn]


def write_adapter(path: Path, base: Path, seed: int, version: str) -> Path:
    """A LoRA of rank 2 on every layer that conv_dim adapts."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for site in (
        site
        for target_modules in find_adapter_targets(open_base_model("--sd_model", base), True)
        for site in target_modules
    ):
        outputs, inputs, *kernel = site.module.weight.shape  # type: ignore[union-attr, misc]
        tensors[f"{site.name}.lora_down.weight"] = torch.randn(2, inputs, *kernel, generator=generator)
        tensors[f"{site.name}.lora_up.weight"] = torch.randn(outputs, 2, *(1,) * len(kernel), generator=generator)
        tensors[f"{site.name}.alpha"] = torch.tensor(3.0)
    save_safetensors(path, tensors, {"ss_base_model_version": version})
    return path


def changes(path: Path) -> dict[str, Tensor]:
    """Return the change of each module of a LoRA as a float64 matrix."""
    tensors = {key: tensor.double() for key, tensor in load_state_dict(path).items()}
    change_by_module = {}
    for name in dict.fromkeys(key.partition(".")[0] for key in tensors):
        up, down = (tensors[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        change_by_module[name] = up @ down * float(tensors[f"{name}.alpha"]) / down.shape[0]
    return change_by_module


def weighted_changes(path: Path, ratio: float, weights: list[float]) -> dict[str, Tensor]:
    by_block = dict(zip(NAMED[len(weights)], weights, strict=True))
    return {name: ratio * by_block.get(block_of(name), 1.0) * change for name, change in changes(path).items()}


def as_json(values: list[float]) -> str:
    return json.dumps(values)


@pytest.mark.parametrize("length", [17, 26])
def test_merging_two_sd_loras_applies_the_strength_of_each_block(
    tmp_path: Path, tiny_sd_file: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (write_adapter(tmp_path / f"{seed}.safetensors", tiny_sd_file, seed, "sd_v1") for seed in (91, 92))
    lists, out = [random_strengths(length, 93), random_strengths(length, 94)], tmp_path / "m.safetensors"
    lists[1][3] = 0.25  # the block that the first file does not contribute to
    arguments = ["--models", str(a), str(b), "--ratios", "0.5", "-2", "--lbws", *map(as_json, lists)]
    assert svd_merge_lora.main([*arguments, "--new_rank", "4", "--save_to", str(out)]) == 0
    first, second, merged = weighted_changes(a, 0.5, lists[0]), weighted_changes(b, -2.0, lists[1]), changes(out)
    assert merged.keys() == first.keys() == second.keys()
    for name, change in merged.items():
        torch.testing.assert_close(change, first[name] + second[name], rtol=1e-4, atol=2e-5)  # float32, by SVD
    assert ("are in no block of a list of 17 (IN03" in caplog.text) == (length == 17)


@pytest.mark.parametrize("length", [12, 20, 26])
def test_merging_into_an_sdxl_checkpoint_applies_the_strength_of_each_block(
    tmp_path: Path, tiny_sdxl_file: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = write_adapter(tmp_path / "a.safetensors", tiny_sdxl_file, 95, "sdxl_base_v1-0")
    weights, out = random_strengths(length, 96), tmp_path / "m.safetensors"
    arguments = ["--sd_model", str(tiny_sdxl_file), "--models", str(adapter), "--ratios", "0.8", "--lbws"]
    assert sdxl_merge_lora.main([*arguments, as_json(weights), "--save_to", str(out)]) == 0
    before, after = load_state_dict(tiny_sdxl_file), load_state_dict(out)
    expected = weighted_changes(adapter, 0.8, weights)
    num_checked = 0
    for key, old in before.items():
        if not key.startswith("model.diffusion_model.") or not key.endswith(".weight"):
            continue
        name = "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        change = expected.get(name)
        if change is None:
            assert torch.equal(after[key], old)
            continue
        num_checked += 1
        torch.testing.assert_close(after[key], (old.double() + change.reshape(old.shape)).float(), **FLOAT32_SAME_MATH)
    assert num_checked == sum(name.startswith("lora_unet_") for name in expected) > 50
    assert ("IN09" in caplog.text) == (length == 26)  # blocks that SDXL lacks


def test_a_strength_of_zero_excludes_the_block(tmp_path: Path, tiny_sd_file: Path) -> None:
    adapter, out = write_adapter(tmp_path / "a.safetensors", tiny_sd_file, 97, "sd_v1"), tmp_path / "m.safetensors"
    only_text = ",".join(["1"] + ["0"] * 25)
    assert merge_lora.main(["--models", str(adapter), "--lbws", only_text, "--save_to", str(out)]) == 0
    assert {key[:8] for key in load_state_dict(out)} == {"lora_te_"}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (["[1,2]"], "--lbws has a list of 2 numbers,"),
        (["[" + "1," * 11 + "1]"], "is for Stable Diffusion 1.x, which needs 17 or 26"),
        (["[1,two]"], 'has "[1,two]", which is not a list of numbers'),
        (["1", "1"], "--lbws has 2 lists, but --models 1"),
        (["0," * 25 + "0"], "--lbws gives every module of"),
    ],
)
def test_invalid_lists_are_refused(
    tmp_path: Path, lists: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_small_adapter(tmp_path / "a.safetensors", 98, {})
    tensors = load_state_dict(adapter)
    save_safetensors(adapter, tensors, {"ss_base_model_version": "sd_v1"})
    out = tmp_path / "m.safetensors"
    assert merge_lora.main(["--models", str(adapter), "--save_to", str(out), "--lbws", *lists]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_lbws_is_refused_for_a_model_without_a_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(48, 2)}
    save_safetensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "flux1"})
    arguments = ["--models", str(tmp_path / "a.safetensors"), "--lbws", "1,1", "--save_to", str(tmp_path / "m.sft")]
    assert merge_lora.main(arguments) == 1
    assert "is for FLUX.1, which has none" in capsys.readouterr().err
    assert merge_flux_lora.main(arguments) == 1
    assert "FLUX.1" in capsys.readouterr().err
