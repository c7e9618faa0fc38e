"""tools/merge_models.py: every weight is the sum of ratio * weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.headers import read_metadata
from tests.tolerances import FLOAT32_SAME_MATH
from tools import merge_models

UNET, TEXT = "model.diffusion_model.out.weight", "cond_stage_model.transformer.weight"


def write(folder: Path, seed: int, **more: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(3, 5, generator=generator) for name in (UNET, TEXT)}
    save_file({**tensors, "position_ids": torch.arange(4), **more}, folder / f"{seed}.safetensors")
    return folder / f"{seed}.safetensors"


def merge(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    assert merge_models.main([*words, "--output", str(folder / "merged.safetensors")]) == 0
    return load_file(folder / "merged.safetensors")


def test_weights_are_summed_by_their_ratios(tmp_path: Path) -> None:
    paths = [write(tmp_path, seed) for seed in (3, 4, 5)]
    merged = merge(tmp_path, "--models", *map(str, paths), "--ratios", "0.5", "0.75", "-0.25")
    first, second, third = map(load_file, paths)
    for key in (UNET, TEXT):
        expected = 0.5 * first[key] + 0.75 * second[key] - 0.25 * third[key]
        torch.testing.assert_close(merged[key], expected, **FLOAT32_SAME_MATH)
    assert torch.equal(merged["position_ids"], torch.arange(4))
    assert read_metadata(tmp_path / "merged.safetensors")["modelspec.merged_from"] == "3, 4, 5"


def test_without_ratios_the_shares_are_equal_and_the_requested_precision_is_used(tmp_path: Path) -> None:
    paths = [write(tmp_path, seed) for seed in (6, 7)]
    merged = merge(tmp_path, "--models", *map(str, paths), "--saving_precision", "bf16")
    first, second = map(load_file, paths)
    assert torch.equal(merged[UNET], ((first[UNET] + second[UNET]) / 2).bfloat16())


def test_unet_only_leaves_the_other_parts_alone(tmp_path: Path) -> None:
    paths = [write(tmp_path, seed) for seed in (8, 9)]
    merged = merge(tmp_path, "--models", *map(str, paths), "--unet_only")
    assert torch.equal(merged[TEXT], load_file(paths[0])[TEXT])
    assert not torch.equal(merged[UNET], load_file(paths[0])[UNET])


def test_weights_that_the_files_do_not_share_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    four, eight = torch.full((2,), 4.0), torch.full((2,), 8.0)
    paths = write(tmp_path, 10, first_only=four), write(tmp_path, 11, second_only=eight)
    merged = merge(tmp_path, "--models", *map(str, paths), "--ratios", "0.5", "0.25", "--show_skipped")
    assert "second_only" not in merged
    torch.testing.assert_close(merged["first_only"], 0.75 * four, **FLOAT32_SAME_MATH)
    assert "omitting 1 weights that the first file lacks: second_only" in caplog.text
    assert "lacks 1 weights; using the first file's" in caplog.text


def test_invalid_values_are_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = write(tmp_path, 12), write(tmp_path, 13, **{UNET: torch.ones(7)})
    save_file({"x": torch.ones(1)}, tmp_path / "bare.safetensors")
    for words, sentence in (
        (["--models", str(first), str(other), "--ratios", "1"], "--ratios has 1 values, but --models 2"),
        (["--models", str(first), str(other)], f"{UNET} has shape (3, 5)"),
        (["--models", str(first), str(tmp_path)], "is a folder; use single-file checkpoints"),
        (["--models", str(tmp_path / "bare.safetensors"), "--unet_only"], "--unet_only: "),
        (["--models", str(tmp_path / "none.safetensors")], "--models"),
    ):
        assert merge_models.main([*words, "--output", str(tmp_path / "out.safetensors")]) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_files_without_a_common_weight_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path, 21)
    save_file({"lora_unet_a.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    for others in ((first, tmp_path / "lora.safetensors"), (tmp_path / "none.safetensors", first)):
        words = ["--models", *map(str, others), "--output", str(tmp_path / "m.safetensors")]
        assert merge_models.main(words) == 1
        assert "have no weight in common; use checkpoints of one base model" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_weights_that_become_non_finite_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, large = torch.full((2,), float("nan")), torch.full((2,), 1e5)
    paths = write(tmp_path, 13, average=broken, bias=large), write(tmp_path, 14, average=broken, bias=large)
    words = ["--models", *map(str, paths)]
    merge(tmp_path, *words)
    assert "1 weights have values that are not finite" in caplog.text and ": average; --models have them" in caplog.text
    merge(tmp_path, *words, "--saving_precision", "fp16")
    assert (
        "2 weights have values that are not finite" in caplog.text
        and ": average, bias; --models have them" in caplog.text
    )
