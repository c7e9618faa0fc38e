"""Draws regularisation images with the base model before the data is opened (`prompt` and `num` of a subset)."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from library.base.errors import naming
from library.base.progress import progress_bar
from library.checkpoints.marks import mark_of
from library.data.description.class_images import list_missing, parse_prompt
from library.data.description.schema import RunDataConfig, SubsetConfig
from library.data.plan.dataset_digest import REVISIONS
from library.data.training_data import TrainingData
from library.memory.devices import release_memory
from library.processes.process_group import Processes
from library.protocols import Architecture
from library.training.command_line.resolved import Start
from library.training.evaluation.prompts import resolve_all
from library.training.evaluation.without_side_effects import random_streams_kept
from library.training.failures.out_of_memory import explain_out_of_memory
from library.training.models import opening
from library.training.offline.contact_sheet import Row, draw_rows
from library.training.reporting.sample_images import Drawn, write_image
from library.types import Prompt

logger = logging.getLogger(__name__)

TITLE = "drawing regularisation images"


def open_data(start: Start[Any], device: torch.device, processes: Processes) -> TrainingData:
    """Open the data of a run. What is missing of the images that it describes is drawn first, in the first process of
    each machine; a look and a dry run draw nothing.

    What is drawn stays, so an interrupted run goes on with the next image. Raises UserError for a prompt that is none,
    and for memory that does not suffice.
    """
    options, arch = start.options, start.arch

    def draw(config: RunDataConfig) -> None:
        subsets = [(d, s) for d in config.datasets for s in d.subsets if s.prompt is not None]
        missing = [images for d, s in subsets for images in list_prompts(s, d.resolution, arch)]
        if missing and processes.is_local_main:
            rows = [Row([], [prompt]) for _, prompt in missing]
            drawn = draw_rows(options.network, options.precision, options.memory, arch, rows, device)
            with explain_out_of_memory(TITLE, options, device, ""), random_streams_kept(device):
                write(missing, drawn)
            release_memory(options.memory.highvram)
        if subsets:
            processes.wait_for_all(TITLE)

    only_looks = options.diagnostics.dry_run or options.dataset.debug_dataset
    return opening.open_training_data(
        options,
        arch,
        start.text,
        start.seed,
        processes.count,
        None if only_looks else draw,
        {} if start.state is None else start.state.dataset.get(REVISIONS, {}),
    )


def list_prompts(subset: SubsetConfig, resolution: tuple[int, int], arch: Architecture) -> list[tuple[Path, Prompt]]:
    """Return the images of a subset that are missing, with what each is drawn from."""
    spec, (width, height) = parse_prompt(subset), resolution
    with naming("prompt"):
        (prompt,) = resolve_all([replace(spec, width=spec.width or width, height=spec.height or height)], arch)
    return [(path, replace(prompt, seed=int(path.stem))) for path in list_missing(subset)]


def write(missing: Sequence[tuple[Path, Prompt]], drawn: Iterator[list[Image.Image]]) -> None:
    """Write each image as soon as it is drawn."""
    folders = ", ".join(dict.fromkeys(str(path.parent) for path, _ in missing))
    logger.info("%d regularisation images are drawn with the base model, into %s", len(missing), folders)
    with progress_bar(TITLE, len(missing)) as bar:
        for (path, prompt), (image,) in zip(missing, drawn, strict=True):
            write_image(path, Drawn(0, prompt, image), mark_of("regularisation image", path))
            bar.update(1)
