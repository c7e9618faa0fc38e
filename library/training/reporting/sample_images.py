"""Preview files: names, contents and metadata."""

import base64
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from library.checkpoints.marks import RUN, mark_of, save_image
from library.checkpoints.overwriting import find_place, marked
from library.options.output.saving import SavingOptions
from library.training.reporting.events import Preview
from library.types import Prompt

FOLDER = "sample"  # in `output_dir`; front ends show its files and fail if it contains a folder
GRID_FOLDER = "sample_grid"  # next to it
GRID_GAP = 4  # pixels
TIMESTAMP = "%Y%m%d%H%M%S"
TIME_IN_NAME = re.compile(r"_\d{14}(?=[_.])")
THUMBNAIL_SIDE = 256  # longer side of the copy in events, in pixels
MARK = "\0"  # placeholder for a timestamp; no file name contains it


@dataclass(frozen=True)
class Drawn:
    """A preview image."""

    index: int  # of its prompt, from 0
    prompt: Prompt
    image: Image.Image


def image_path(options: SavingOptions, event: str, index: int, seed: int | None, timestamp: str | None = None) -> Path:
    """Return `sample/<name>_<event>_<index>_<YYYYmmddHHMMSS>[_<seed>].png`; event is the step, or `e` and the epoch.

    The time is now, unless `timestamp` replaces it.
    """
    assert options.output_dir is not None
    name = f"{options.output_name}_" if options.output_name else ""
    ending = "" if seed is None else f"_{seed}"
    timestamp = timestamp or time.strftime(TIMESTAMP)
    return Path(options.output_dir) / FOLDER / f"{name}{event}_{index:02d}_{timestamp}{ending}.png"


def grid_path(options: SavingOptions, event: str, timestamp: str | None = None) -> Path:
    """Return `sample_grid/<name>_<event>_<YYYYmmddHHMMSS>.png`."""
    assert options.output_dir is not None
    name = f"{options.output_name}_" if options.output_name else ""
    timestamp = timestamp or time.strftime(TIMESTAMP)
    return Path(options.output_dir) / GRID_FOLDER / f"{name}{event}_{timestamp}.png"


def is_written(path_of: Callable[[str], Path], since: float) -> bool:
    """Return True if a file of `path_of(timestamp)` was written at `since` (seconds since 1970) or later."""
    path = path_of(MARK)
    start, end = path.name.split(MARK)
    name = re.compile(re.escape(start) + r"\d{14}" + re.escape(end))
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    return any(name.fullmatch(file.name) and file.stat().st_mtime >= since for file in files)


def is_preview_stem(output_name: str | None, stem: str) -> bool:
    """Return True if a file with this stem is a preview or a grid of the run."""
    name = f"{output_name}_" if output_name else ""
    return re.fullmatch(re.escape(name) + r"e?\d{6,}(_\d{2,})?_\d{14}(_-?\d+)?", stem) is not None


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """Convert values from -1 to 1 to an image, clipping others."""
    values = ((pixels_CHW.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy().astype(np.uint8))


def to_grid(images: Sequence[Image.Image]) -> Image.Image:
    """Arrange images row by row in a nearly square grid, each centred in its cell."""
    num_columns = ceil(sqrt(len(images)))
    width, height = (max(image.size[axis] for image in images) + GRID_GAP for axis in (0, 1))
    num_rows = ceil(len(images) / num_columns)
    grid = Image.new(images[0].mode, (num_columns * width - GRID_GAP, num_rows * height - GRID_GAP))
    for n, image in enumerate(images):
        row, column = divmod(n, num_columns)
        offset = [(cell - GRID_GAP - length) // 2 for cell, length in zip((width, height), image.size, strict=True)]
        grid.paste(image, (column * width + offset[0], row * height + offset[1]))
    return grid


def build_preview_event(drawn: Drawn, path: Path, step: int, epoch: int) -> Preview:
    prompt, (width, height) = drawn.prompt, drawn.image.size
    return Preview(
        step, epoch, drawn.index, prompt.text, prompt.seed, width, height, str(path), encode_data_url(drawn.image),
        prompt.strength,
    )  # fmt: skip


def encode_data_url(image: Image.Image, width: int = THUMBNAIL_SIDE, height: int = THUMBNAIL_SIDE) -> str:
    """Encode a copy of at most this size as a data: URL, about a kilobyte per 10,000 pixels."""
    small, content = composite_on_white(image), BytesIO()
    small.thumbnail((width, height))
    small.save(content, format="WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def composite_on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def write_grid(path: Path, drawn: Sequence[Drawn]) -> None:
    """Write the images of one event as a grid, beside a file that another program has put there."""
    path = find_preview_place(path)
    save_image(path, to_grid([preview.image for preview in drawn]), preview_mark(path))


def write_preview(path: Path, drawn: Drawn) -> Path:
    """Write a preview, beside a file that another program has put there. Return its path."""
    path = find_preview_place(path)
    write_image(path, drawn, preview_mark(path))
    return path


def find_preview_place(path: Path) -> Path:
    return find_place(path, marked("a preview of this run", preview_mark(path)))


def preview_mark(path: Path) -> str:
    """Return the mark of a preview; without the time in its name, so that equal previews are equal files."""
    return mark_of(RUN, path.with_name(TIME_IN_NAME.sub("", path.name)))


def write_image(path: Path, drawn: Drawn, mark: str) -> None:
    """Write a PNG atomically, with the prompt in the text field that other programs read."""
    save_image(path, drawn.image, mark, {"parameters": format_parameters(drawn.prompt)})


def format_parameters(prompt: Prompt) -> str:
    """Format the prompt and its settings like AUTOMATIC1111's program."""
    settings = {
        "Steps": prompt.num_steps,
        "Sampler": prompt.sampler,
        "CFG scale": prompt.scale,
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
        "Distilled CFG Scale": prompt.guidance_scale,
        "Shift": prompt.flow_shift or None,  # 0 stands for the shift by image size
        "Adapter strength": None if prompt.strength == 1 else prompt.strength,
    }
    last = ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
    negative = [f"Negative prompt: {prompt.negative}"] if prompt.negative else []
    return "\n".join([prompt.text, *negative, last])
