"""Shows the noise levels that a run would draw and their loss weights (`show_timesteps`), without a model or images."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from library.base.errors import about
from library.base.launcher import launched_rank
from library.checkpoints.marks import mark_of, save_image
from library.checkpoints.overwriting import check_target, marked
from library.diffusion.flow import FlowMatching
from library.diffusion.timesteps import NUM_TIMESTEPS, LevelDraws, scheme_weights
from library.options.base import Options
from library.options.output.saving import SavingOptions
from library.options.training.flow import TimestepPreviewOptions
from library.training.reporting.console_lines import announce

logger = logging.getLogger(__name__)

WRITER = "--show_timesteps image"
NUM_DRAWS = 100_000  # a bin with a fiftieth of the draws is accurate to about 2 %
NUM_BINS = 50
BIN_SIZE = NUM_TIMESTEPS // NUM_BINS
MOST_MARKS = 60  # length of the longest bar on the console, in characters
BAR_WIDTH, PLOT_HEIGHT, MARGIN = 16, 320, 32  # pixels
BAR_COLOUR, WEIGHT_COLOUR = (70, 110, 180), (200, 70, 40)


@dataclass(frozen=True)
class DrawnLevels:
    """The distribution of drawn timesteps, in bins of 20 of 1000, from clean to pure noise."""

    shares: list[float]  # fractions of all draws
    weights: list[float]  # loss weight at the middle of each bin


def resolve_timestep_preview(options: Options) -> TimestepPreviewOptions | None:
    """Return the options of the preview of timesteps; None if it is not requested or the base model has none."""
    values = options.flat()
    if not values.get("show_timesteps"):
        return None
    return TimestepPreviewOptions(**{name: values[name] for name in TimestepPreviewOptions.defaults()})


def show_timesteps(
    options: TimestepPreviewOptions, saving: SavingOptions, seed: int, objective: FlowMatching, downscale: int
) -> None:
    """Draw timesteps as training does, and show them on the console or as an image in the output folder.

    `downscale` is in pixels per latent. Raises UserError for an invalid resolution, or an image without a folder.
    """
    image_path = image_place(saving) if options.show_timesteps == "image" else None
    if image_path is not None:
        check_target(f"{WRITER}:", image_path, marked("an image of timesteps", mark_of(WRITER, image_path)))
    height, width = read_resolution(options.show_timesteps_resolution)
    offset = options.show_timesteps_offset
    if offset and not objective.takes_offset:
        logger.warning(
            "--show_timesteps_offset %g has no effect: no normal value that it could move is behind these draws; one "
            "is behind those of --timestep_sampling sigmoid and shift and of --weighting_scheme logit_normal",
            offset,
        )
    levels = draw_levels(objective, height // downscale, width // downscale, offset, seed)
    if launched_rank() != 0:
        return
    title = f"{NUM_DRAWS} draws of noise levels, 0 is the image and 1000 pure noise, at {width}x{height}"
    title += f" with an offset of {offset:g}" if offset and objective.takes_offset else ""
    if image_path is None:
        for line in (title, *table_lines(levels)):
            announce(line)
    else:
        save_image(image_path, plot(levels, title), mark_of(WRITER, image_path))
        logger.info("the distribution of noise levels is in %s", image_path)


def read_resolution(text: str) -> tuple[int, int]:
    """Parse "1024" or "1024,768" to height and width in pixels. Raises UserError."""
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise about("--show_timesteps_resolution")(f"is {text!r}", "use pixels: 1024 for a square, or HEIGHT,WIDTH")
    return int(parts[0]), int(parts[-1])


def image_place(saving: SavingOptions) -> Path:
    """Return the path of the image. Raises UserError without a folder for it."""
    if not saving.output_dir:
        raise about("--show_timesteps")("image has no place for its file", "give --output_dir, or use console")
    return Path(saving.output_dir) / f"{saving.output_name or 'last'}-timesteps.png"


def draw_levels(
    objective: FlowMatching, latent_height: int, latent_width: int, offset: float, seed: int
) -> DrawnLevels:
    """Count the objective's draws for images of one size."""
    generator = torch.Generator().manual_seed(seed)
    offsets_B = torch.full((NUM_DRAWS,), offset)
    timesteps_B = objective.draw_timesteps(LevelDraws(NUM_DRAWS, latent_height, latent_width, generator, offsets_B))
    # Pure noise, timestep 1000, belongs to the last bin.
    bins_B = (timesteps_B / BIN_SIZE).long().clamp(max=NUM_BINS - 1)
    bin_centres: Tensor = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS
    return DrawnLevels(
        shares=(torch.bincount(bins_B, minlength=NUM_BINS) / NUM_DRAWS).tolist(),
        weights=scheme_weights(objective.loss_scheme, bin_centres).tolist(),
    )


def table_lines(levels: DrawnLevels) -> list[str]:
    """Return a row for each bin: its timesteps, its share of the draws, its loss weight, and a bar."""
    lines = ["timesteps   share  loss weight"]
    for i, (share, weight) in enumerate(zip(levels.shares, levels.weights, strict=True)):
        bar = "#" * round(MOST_MARKS * share / max(levels.shares))
        lines.append(f"{i * BIN_SIZE:4d}-{(i + 1) * BIN_SIZE - 1:4d}  {share:6.2%}  {weight:11.4g}  {bar}".rstrip())
    return lines


def plot(levels: DrawnLevels, title: str) -> Image.Image:
    """Plot the shares as bars and the weights as a line, each scaled to the plot's height."""
    width, bottom = NUM_BINS * BAR_WIDTH + 2 * MARGIN, MARGIN + PLOT_HEIGHT
    image = Image.new("RGB", (width, bottom + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 10), title, fill="black")
    lefts = [MARGIN + i * BAR_WIDTH for i in range(NUM_BINS)]
    for left, share in zip(lefts, levels.shares, strict=True):
        height = round(PLOT_HEIGHT * share / max(levels.shares))
        if height:
            draw.rectangle((left, bottom - height, left + BAR_WIDTH - 2, bottom - 1), fill=BAR_COLOUR)
    points = [
        (left + BAR_WIDTH / 2, bottom - PLOT_HEIGHT * weight / max(levels.weights))
        for left, weight in zip(lefts, levels.weights, strict=True)
    ]
    draw.line(points, fill=WEIGHT_COLOUR, width=2)
    draw.line((MARGIN, bottom, width - MARGIN, bottom), fill="black")
    for timestep in range(0, NUM_TIMESTEPS + 1, NUM_TIMESTEPS // 5):
        draw.text((MARGIN + timestep * BAR_WIDTH // BIN_SIZE, bottom + 4), str(timestep), fill="black", anchor="ma")
    draw.text((MARGIN, bottom + 24), f"bars: share of the draws, most {max(levels.shares):.2%}", fill=BAR_COLOUR)
    draw.text((width // 2, bottom + 24), f"line: loss weight, most {max(levels.weights):.4g}", fill=WEIGHT_COLOUR)
    return image
