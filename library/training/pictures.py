"""Preview pictures as files: their names, their bytes, and what is written into them."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from library.checkpoints.files import atomic_path
from library.options.saving import SavingOptions
from library.types import Prompt

FOLDER = "sample"  # in --output_dir; front ends look there


@dataclass(frozen=True)
class Drawn:
    """One picture."""

    index: int  # of its prompt, from 0
    prompt: Prompt
    image: Image.Image


def picture_path(options: SavingOptions, event: str, index: int, seed: int | None) -> Path:
    """`sample/<name>_<event>_<index>_<YYYYmmddHHMMSS>[_<seed>].png`; event is `e` and the epoch, or the step."""
    assert options.output_dir is not None
    name = f"{options.output_name}_" if options.output_name else ""
    ending = "" if seed is None else f"_{seed}"
    return Path(options.output_dir) / FOLDER / f"{name}{event}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{ending}.png"


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """The picture of values around -1..1; what lies beyond is cut."""
    values = ((pixels_CHW.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy().astype(np.uint8))


def write_picture(path: Path, drawn: Drawn) -> None:
    """Write a PNG, whole or not at all, with the prompt in the text field that other programs read it from."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_of(drawn.prompt))
    with atomic_path(path) as temporary:
        drawn.image.save(temporary, format="PNG", pnginfo=info)


def parameters_of(prompt: Prompt) -> str:
    """The prompt and its settings, in the form that AUTOMATIC1111's program writes."""
    settings = {
        "Steps": prompt.num_steps,
        "Sampler": prompt.sampler,
        "CFG scale": prompt.scale,
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
        "Distilled CFG Scale": prompt.guidance_scale,
        "Shift": prompt.flow_shift,
    }
    last = ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
    negative = [f"Negative prompt: {prompt.negative}"] if prompt.negative else []
    return "\n".join([prompt.text, *negative, last])
