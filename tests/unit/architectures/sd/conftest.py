"""Fixtures of this package."""

from collections.abc import Callable
from pathlib import Path

import pytest

from library.architectures.sd.assembly import build
from library.options.machine.memory import MemoryOptions, PrecisionOptions
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from library.protocols import Architecture

Open = Callable[..., Architecture]


@pytest.fixture
def open_sd() -> Open:
    """Return a function that builds the architecture of a checkpoint: open_sd(path, vae=..., mixed_precision=...)."""

    def build_arch(path: Path | str | None, mixed_precision: str = "no", xformers: bool = False, **model: object):
        return build(
            TrainOptions(
                model=ModelOptions(pretrained_model_name_or_path=None if path is None else str(path), **model),
                precision=PrecisionOptions(mixed_precision=mixed_precision),
                memory=MemoryOptions(xformers=xformers),
            )
        )

    return build_arch
