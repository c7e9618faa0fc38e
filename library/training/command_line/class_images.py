"""Draws regularisation images with the base model before the data is opened (`prompt` and `num` of a subset)."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from library.base.errors import naming
from library.base.progress import progress_bar
from library.checkpoints.marks import mark_of
from library.data.description.class_images import list_missing
from library.data.description.schema import RunDataConfig, SubsetConfig
from library.memory.devices import release_memory
from library.options.train import TrainOptions
from library.processes.process_group import Processes
from library.protocols import Architecture
from library.training.evaluation.prompts import parse_line, resolve_all
from library.training.evaluation.without_side_effects import random_streams_kept
from library.training.failures.out_of_memory import explain_out_of_memory
from library.training.offline.contact_sheet import Row, draw_rows
from library.training.reporting.sample_images import Drawn, write_image
from library.types import Prompt

logger = logging.getLogger(__name__)


def draw_class_images(
    options: TrainOptions, arch: Architecture, device: torch.device, processes: Processes, config: RunDataConfig
) -> None:
    """Draw what is missing of the images that `config` describes, in the first process of each machine. What is drawn
    stays, so an interrupted run goes on with the next image.

    Raises UserError for a prompt that is none, and for memory that does not suffice.
    """
    subsets = [(d, s) for d in config.datasets for s in d.subsets if s.prompt is not None]
    if not subsets:
        return
    if processes.is_local_main:
        missing = [
            (path, prompt)
            for dataset, subset in subsets
            for path, prompt in list_prompts(subset, dataset.resolution, arch)
        ]
        if missing:
            with explain_out_of_memory("drawing regularisation images", options, device, ""):
                draw(options, arch, device, missing)
    processes.wait_for_all("drawing regularisation images")


def list_prompts(subset: SubsetConfig, resolution: tuple[int, int], arch: Architecture) -> list[tuple[Path, Prompt]]:
    """Return the images of a subset that are missing, with what each is drawn from."""
    with naming("prompt"):
        spec = parse_line(str(subset.prompt), f"prompt {subset.prompt!r}")
        width, height = resolution
        (prompt,) = resolve_all([replace(spec, width=spec.width or width, height=spec.height or height)], arch)
    return [(path, replace(prompt, seed=int(path.stem))) for path in list_missing(subset)]


def draw(options: TrainOptions, arch: Architecture, device: torch.device, missing: list[tuple[Path, Prompt]]) -> None:
    """Draw images one after another, with the models loaded once."""
    folders = ", ".join(dict.fromkeys(str(path.parent) for path, _ in missing))
    logger.info("%d regularisation images are drawn with the base model, into %s", len(missing), folders)
    rows = [Row([], [prompt]) for _, prompt in missing]
    with random_streams_kept(device), progress_bar("drawing regularisation images", len(missing)) as bar:
        images = draw_rows(options.network, options.precision, options.memory, arch, rows, device)
        for (path, prompt), (image,) in zip(missing, images, strict=True):
            write_image(path, Drawn(0, prompt, image), mark_of("regularisation image", path))
            bar.update(1)
    release_memory(options.memory.highvram)
