"""Small datasets on disk and the options that read them."""

import argparse
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from library.data.batches.planned import PlannedBatches
from library.data.batches.validation_set import ValidationSet
from library.data.caching import latent_index
from library.data.plan.data_plan import DataPlan, build_plan, is_writable
from library.data.sources.folders import image_index
from library.data.sources.folders.image_index import compute_stamp
from library.data.training_data import open_batches
from library.options.train import TrainOptions
from library.protocols import LatentSpec
from library.types import Batch

SPEC = LatentSpec(channels=4, downscale=8, bucket_step=64, cache_suffix="_sd.npz", had_keys_without_size=True)


def options_of(arguments: str = "", *more: str) -> TrainOptions:
    """Parse a command line into options; `more` holds arguments that contain spaces."""
    parser = argparse.ArgumentParser()
    TrainOptions.add_to(parser)
    return TrainOptions.from_args(parser.parse_args([*arguments.split(), *more]))


def write_image(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, mode: str = "RGB") -> Path:
    """Write an image of random noise; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels, mode=mode).save(path)
    return path


def write_folder(
    folder: Path, count: int, size: tuple[int, int] = (64, 64), caption: str | None = "a tag", seed: int = 0
) -> Path:
    """Write images p0.png, p1.png, ... with captions in .txt files."""
    for i in range(count):
        path = write_image(folder / f"p{i}.png", size, seed=100 * seed + i)
        if caption is not None:
            path.with_suffix(".txt").write_text(f"{caption} {i}", encoding="utf-8")
    return folder


def hide_change_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files have no time of their status change, as on Windows, where that of their creation is kept."""
    monkeypatch.setattr(image_index, "HAS_CHANGE_TIMES", False)
    monkeypatch.setattr(latent_index, "HAS_CHANGE_TIMES", False)

    def compute(status: os.stat_result, now_ns: float = math.inf) -> int:
        times: Any = SimpleNamespace(st_size=status.st_size, st_mtime_ns=status.st_mtime_ns, st_ctime_ns=0)
        return compute_stamp(times, now_ns)

    for module in (image_index, latent_index):
        monkeypatch.setattr(module, "compute_stamp", compute)


@contextmanager
def unwritable(*folders: Path) -> Iterator[None]:
    """Let nobody create files in some folders; skip the test where that is impossible."""
    with ExitStack() as stack:
        for folder in folders:
            stack.callback(folder.chmod, folder.stat().st_mode)
            folder.chmod(0o500)
            if is_writable(str(folder)):  # root ignores permissions, and Windows those of folders
                if not shutil.which("chattr") or subprocess.run(["chattr", "+i", folder], check=False).returncode:
                    pytest.skip("no folder can be made read-only here")
                stack.callback(subprocess.run, ["chattr", "-i", folder], check=True)
        yield


@contextmanager
def full_disk(num_bytes: int = 0) -> Iterator[None]:
    """Let no file of this process and its children grow beyond some bytes; the error is EFBIG in place of ENOSPC."""
    resource = pytest.importorskip("resource")  # POSIX
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_config(path: Path, text: str) -> TrainOptions:
    """Write a dataset file and return the options of a run with it; {here} stands for the file's folder."""
    path.write_text(text.replace("{here}", path.parent.as_posix()), encoding="utf-8")
    return options_of("--dataset_config", str(path))


def plan_of(options: TrainOptions, seed: int = 1, spec: LatentSpec = SPEC) -> DataPlan:
    return build_plan(options, spec, seed, None, None)


def batches_of(
    source: DataPlan | PlannedBatches, epoch: int = 1, first: int = 0, workers: int = 0, persistent: bool = False
) -> list[Batch]:
    """Return the batches of an epoch, one optimizer step each."""
    batches = open_batches(source) if isinstance(source, DataPlan) else source
    batch_indices = range(first, batches.plan.num_batches)
    return list(batches.iterate_epoch(epoch, batch_indices, lambda i: (epoch - 1) * 100 + i, workers, persistent))


def validation_of(plan: DataPlan) -> ValidationSet:
    """Return the validation set of a plan, with nothing cached."""
    return open_batches(plan).validation


def content_of(batch: Batch) -> tuple[object, ...]:
    """Return everything that two bit-for-bit equal batches have in common."""
    images = (batch.pixels_BCHW, batch.latents_BCHW, batch.masks_B1HW)
    tensors = (*images, batch.loss_weights_B, batch.sizes_B6, batch.crops_B2)
    return (batch.keys, batch.captions, batch.attributes, *(None if t is None else t.tolist() for t in tensors))


def averaging_vae(calls: list[int] | None = None) -> Callable[[Tensor, Sequence[Generator] | None], Tensor]:
    """Return an encoder whose latents are means of 8 x 8 pixels plus a little noise from each image's generator."""

    def encode(pixels_BCHW: Tensor, generators: Sequence[Generator] | None) -> Tensor:
        if calls is not None:
            calls.append(len(pixels_BCHW))
        means_BCHW = torch.nn.functional.avg_pool2d(pixels_BCHW, 8)
        latents_BCHW = torch.cat([means_BCHW, means_BCHW[:, :1]], 1)
        if generators is None:
            return latents_BCHW
        noise = [torch.randn(latents_BCHW.shape[1:], generator=g) for g in generators]
        return latents_BCHW + 0.01 * torch.stack(noise)

    return encode
