"""--dry_run, and runs that run out of memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree

from library.data.caching import latents
from library.data.sources.folders import image_index
from library.training.loop import loop
from tests.running import Finished, make_images

Train = Callable[..., Finished]


def files_below(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("options", [[], ["--cache_latents_to_disk"]], ids=["plain", "cached"])
def test_a_dry_run_reports_its_requirements_and_writes_nothing(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Images of 96x64 form the largest bucket; a real run would index folders of any size."""
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    make_images(tmp_path / "data" / "1_small", 3, side=64)
    make_images(tmp_path / "data" / "1_large", 2, side=128)
    before = files_below(tmp_path)
    encoded: list[int] = []
    honest = latents.encode_batch
    monkeypatch.setattr(latents, "encode_batch", lambda jobs, *rest: encoded.append(len(jobs)) or honest(jobs, *rest))
    buckets = ["--enable_bucket", "--bucket_no_upscale", "--min_bucket_reso", "64", "--resolution", "128"]
    logs = ["--logging_dir", str(tmp_path / "logs")]
    done = train([*base_arguments, *buckets, *logs, *options, "--dry_run", "--max_train_steps", "50"])
    assert done.status == 0, done.stderr
    assert files_below(tmp_path) == before
    assert "the largest batch has 2 images of 128x128" in done.stderr
    assert "27904 parameters are trained" in done.stderr
    assert "dry run: 50 steps in " in done.stderr and "memory of a step: peak" in done.stderr
    assert sum(encoded) == (2 if options else 0)


def test_a_resolution_far_from_the_base_models_own_is_warned_of(train: Train, base_arguments: list[str]) -> None:
    for side, is_far in ((64, False), (24, True)):  # the tiny model's folder states 64
        done = train([*base_arguments, "--resolution", str(side), "--debug_dataset"])
        assert done.status == 0, done.stderr
        line = f"resolution is {side}x{side}, but this base model is trained at 512x512"
        assert (line in done.stderr) == is_far


ROUNDED = ["--mixed_precision", "bf16", "--full_bf16", "--stochastic_rounding"]


def test_a_dry_run_rounds_and_swaps_the_weights_like_a_real_run(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the dtypes that a schedule-free optimizer sees in its step and in evaluation mode."""
    met: list[tuple[str, torch.dtype]] = []
    for name in ("step", "eval"):
        honest = getattr(AdamWScheduleFree, name)

        def noting(optimizer: Any, *given: Any, name: str = name, honest: Any = honest) -> Any:
            met.append((name, optimizer.param_groups[0]["params"][0].dtype))
            return honest(optimizer, *given)

        monkeypatch.setattr(AdamWScheduleFree, name, noting)
    words = [*base_arguments, *ROUNDED, "--optimizer_type", "AdamWScheduleFree"]
    for more in (["--dry_run"], ["--max_train_steps", "1"]):
        met.clear()
        done = train([*words, *more])
        assert done.status == 0, done.stderr
        assert met[:2] == [("step", torch.float32), ("eval", torch.float32)]
        # The size of the change is measured in evaluation mode too.
        assert set(met[2:]) <= {("eval", torch.float32)}
    assert (tmp_path / "out" / "mine.safetensors").is_file()


def test_a_dry_run_finds_mistakes(train: Train, base_arguments: list[str]) -> None:
    done = train([*base_arguments, "--dry_run", "--network_args", "conv_din=4"])
    assert done.status == 1 and "conv_dim" in done.stderr


def test_running_out_of_memory_in_a_step_is_explained(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = loop.loss_of

    def loss_of(run: Any, batch: Any, batch_number: int) -> Any:
        if batch_number == 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return honest(run, batch, batch_number)

    monkeypatch.setattr(loop, "loss_of", loss_of)
    done = train(base_arguments)
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "out of memory while computing step 3, forward and backward, 2 images of 64x64" in done.stderr
    assert "memory: peak" in done.stderr and "--gradient_checkpointing" in done.stderr


def test_running_out_of_memory_while_caching_is_explained(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_batch(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setattr(latents, "encode_batch", encode_batch)
    done = train([*base_arguments, "--cache_latents", "--vae_batch_size", "2"])
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "out of memory while loading the models and caching" in done.stderr
    assert "--vae_batch_size 1" in done.stderr
