"""Contact sheets: images of several adapter files for the same prompts and noise; models are loaded once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from library.base.errors import error_in
from library.checkpoints.recognition import keys_of_text_encoders
from library.memory.devices import move_to_device, release_memory
from library.options.machine.memory import MemoryOptions, PrecisionOptions
from library.options.training.network import NetworkOptions
from library.protocols import Architecture
from library.training.evaluation.drawing import decode, draw_latents, encode_prompts, seed_generator
from library.training.failures.vae_memory import VaeFallback
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import READER
from library.training.models.frozen_base import check_base
from library.training.models.frozen_models import load_frozen
from library.training.models.weight_formats import BaseFormats
from library.training.offline.adapter_files import NoAdapter, Stack, install_adapters, resolve_models
from library.training.reporting.sample_images import composite_on_white
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import StepContext
from library.types import Conditioning, Prompt
from networks.core.protocol import AdoptedNetwork, open_network_module

GAP = 6  # pixels between images
LABEL_WIDTH, LABEL_HEIGHT, LINE = 210, 58, 17
INK, PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """The images that the same adapters draw."""

    files: Stack
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class Loaded:
    """The base model, loaded once for all files."""

    context: StepContext  # of the base model without an adapter
    vae: nn.Module
    encoded: Mapping[str, Conditioning] | None  # by text; None if files change the text encoders


def draw_rows(
    network: NetworkOptions,
    precision: PrecisionOptions,
    memory: MemoryOptions,
    arch: Architecture,
    rows: Sequence[Row],
    device: torch.device,
) -> Iterator[list[Image.Image]]:
    """Draw the images of one row after another.

    The base model is stored and computes as in a training with these options, including merged adapters. An image
    equals the preview of a run with the same weights, prompt and seed. Raises UserError for a file that does not fit.
    """
    if arch.preview.load_denoiser is not None:
        raise error_in("--turbo_dit", cause="does not fit")(
            "an option names a second model for the previews of a training", "give that one as the base model"
        )
    formats = BaseFormats.load(precision)
    check_base(precision, memory, arch)
    compute = Compute.build(precision, device)
    loaded = load(network, precision, formats, memory, arch, rows, compute)
    for row in rows:
        with torch.no_grad(), install_adapters(row.files, loaded.context.models, compute, arch) as adapter:
            context, encoded = replace(loaded.context, network=adapter), loaded.encoded
            if encoded is None:
                encoded = encode_prompts(arch, context.models.text_encoders, compute.autocast, row.prompts)
            yield [draw(context, loaded.vae, prompt, encoded) for prompt in row.prompts]


def load(
    network: NetworkOptions,
    precision: PrecisionOptions,
    formats: BaseFormats,
    memory: MemoryOptions,
    arch: Architecture,
    rows: Sequence[Row],
    compute: Compute,
) -> Loaded:
    """Load the models to the device; text encoders are unloaded before the denoiser is loaded unless a file changes
    them."""
    encoders = [encoder.to(compute.device).eval() for encoder in arch.load.text_encoders()]
    files = [*map(Path, network.base_weights or ()), *(file for row in rows for file, _ in row.files)]
    prompts = [prompt for row in rows for prompt in row.prompts]
    encoded = None
    if not any(keys_of_text_encoders(file) for file in files):
        encoded = encode_prompts(arch, encoders, compute.autocast, prompts)
        encoders = []
        release_memory(memory.highvram)
    vae = move_to_device(arch.load.vae(), compute.device)
    models = load_frozen(network, formats.denoiser, arch, encoders, vae, compute, open_network_module(READER))
    arch.fit_to_sizes(models.denoiser, [(prompt.width, prompt.height) for prompt in prompts])
    resolve_models(precision, formats, memory, arch, models, compute)

    def no_captions(captions: Sequence[str]) -> Conditioning:
        raise AssertionError(f"nothing is trained on {captions}")

    context = StepContext(
        arch=arch,
        models=models,
        network=AdoptedNetwork(NoAdapter()),
        seed=0,
        device=compute.device,
        autocast=compute.autocast,
        trains_text_encoder=False,
        captions=CaptionMemo(no_captions),
    )
    return Loaded(context, vae, encoded)


def draw(context: StepContext, vae: nn.Module, prompt: Prompt, encoded: Mapping[str, Conditioning]) -> Image.Image:
    latents_BCHW = draw_latents(context, prompt, encoded, seed_generator(prompt, context.seed, 0), vae=vae)
    assert latents_BCHW is not None, "nobody breaks it off"
    return decode(context, vae, latents_BCHW, VaeFallback())


def arrange(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], side: int
) -> Image.Image:
    """Arrange the images as a table, each at most `side` pixels wide and high, with labels on the left and above."""
    thumbnails = [[fit_image(image, side) for image in row] for row in rows]
    width, height = (max(image.size[axis] for row in thumbnails for image in row) + GAP for axis in (0, 1))
    sheet = Image.new("RGB", (LABEL_WIDTH + len(column_labels) * width, LABEL_HEIGHT + len(rows) * height), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, label in enumerate(column_labels):
        write(pen, font, label, (LABEL_WIDTH + column * width, GAP), width - GAP, LABEL_HEIGHT // LINE)
    for row_index, (label, row) in enumerate(zip(row_labels, thumbnails, strict=True)):
        top = LABEL_HEIGHT + row_index * height
        write(pen, font, label, (GAP, top), LABEL_WIDTH - 2 * GAP, max(1, height // LINE))
        for column, image in enumerate(row):
            sheet.paste(composite_on_white(image), (LABEL_WIDTH + column * width, top))
    return sheet


def fit_image(image: Image.Image, side: int) -> Image.Image:
    """Return the image, shrunk if it is larger than `side`."""
    if max(image.size) <= side:
        return image
    # thumbnail works in place.
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def write(
    pen: ImageDraw.ImageDraw, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", text: str,
    corner: tuple[int, int], width: int, most_lines: int,
) -> None:  # fmt: skip
    """Write a text in lines of `width` pixels, truncated if too long."""
    lines = wrap(text, lambda line: pen.textlength(line, font=font) <= width)
    for number, line in enumerate(lines[:most_lines]):
        is_cut = number == most_lines - 1 and len(lines) > most_lines
        pen.text((corner[0], corner[1] + number * LINE), f"{line[:-2]}…" if is_cut else line, fill=INK, font=font)


def wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break a text into lines that fit, at words; a word that is too long is broken anywhere."""
    lines = [""]
    for word in text.split():
        if fits(f"{lines[-1]} {word}".lstrip()):
            lines[-1] = f"{lines[-1]} {word}".lstrip()
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter
    return lines
