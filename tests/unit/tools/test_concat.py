"""--concat of merge_lora.py under its own path and under those of sd-scripts."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from networks import flux_merge_lora, merge_lora, sdxl_merge_lora
from tests.tolerances import FLOAT32_DEEP
from tests.unit.tools import adapter_files
from tools import merge_lora as own


def change(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return alpha / rank * up @ down of a module."""
    down, up = (tensors[f"{name}.lora_{end}.weight"].double().flatten(1) for end in ("down", "up"))
    return tensors[f"{name}.alpha"].double() / len(down) * up @ down


@pytest.mark.parametrize("shuffle", [[], ["--shuffle"]])
@pytest.mark.parametrize("script", [merge_lora, sdxl_merge_lora, flux_merge_lora])
def test_every_path_applies_concat_ratios_as_sd_scripts_does(
    tmp_path: Path, script: ModuleType, shuffle: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """sd-scripts multiplies both factors of file i by ratio_i * sqrt(alpha_i / alpha_1), up without the sign."""
    caplog.set_level("INFO")
    names = ("lora_unet_double_blocks_0_img_mlp_0", "lora_unet_double_blocks_1_img_attn_qkv")
    generator, files, ratios = torch.Generator().manual_seed(87), [], (1.41, -0.7)
    for path, rank, alpha in ((tmp_path / "a.safetensors", 4, 2.0), (tmp_path / "b.safetensors", 6, 3.5)):
        tensors = {f"{name}.lora_down.weight": torch.randn(rank, 9, generator=generator) for name in names}
        tensors.update({f"{name}.lora_up.weight": torch.randn(12, rank, generator=generator) for name in names})
        files.append({**tensors, **{f"{name}.alpha": torch.tensor(alpha) for name in names}})
        save_safetensors(path, files[-1], {})
    words = ["--models", *(str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")), *shuffle]
    out = tmp_path / "m.safetensors"
    words += ["--ratios", *map(str, ratios), "--concat", "--save_to", str(out)]
    assert script.main(words) == 0
    assert "act as in sd-scripts: as 0.99, -0.24 if the ranks are equal" in caplog.text  # r |r| / 2
    for name in names:
        scales = [ratio * (float(f[f"{name}.alpha"]) / 2.0) ** 0.5 for f, ratio in zip(files, ratios, strict=True)]
        theirs = {
            f"{name}.lora_down.weight": torch.cat(
                [s * f[f"{name}.lora_down.weight"] for s, f in zip(scales, files, strict=True)]
            ),
            f"{name}.lora_up.weight": torch.cat(
                [abs(s) * f[f"{name}.lora_up.weight"] for s, f in zip(scales, files, strict=True)], 1
            ),
            f"{name}.alpha": torch.tensor(2.0),
        }
        torch.testing.assert_close(change(load_state_dict(out), name), change(theirs, name), **FLOAT32_DEEP)


def test_shuffled_ranks_are_in_another_order_in_each_file(tmp_path: Path) -> None:
    """Rows of one file are not next to each other, which some users want in order to hide the training data."""
    files = [adapter_files.write(tmp_path / f"{seed}.safetensors", seed) for seed in (88, 89)]
    downs = []
    for out, shuffle in (("plain", []), ("one", ["--shuffle"]), ("two", ["--shuffle"])):
        path = tmp_path / f"{out}.safetensors"
        assert own.main(["--models", *map(str, files), "--concat", *shuffle, "--save_to", str(path)]) == 0
        tensors = load_state_dict(path)
        downs.append(torch.cat([t.flatten() for key, t in tensors.items() if key.endswith("lora_down.weight")]))
        for name in (adapter_files.LINEAR, adapter_files.CLIP):
            expected = sum(change(load_state_dict(file), name) for file in files)
            torch.testing.assert_close(change(tensors, name), expected, **FLOAT32_DEEP)
    assert not any(torch.equal(a, b) for a, b in ((downs[0], downs[1]), (downs[1], downs[2])))  # 1 in 8! ** 3 each
    assert torch.equal(*(down.sort().values for down in downs[:2]))
