"""Sample images of the toy world from the quickstart's base model, with or without a LoRA, and judge them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.architectures.sd.layers import view
from library.base.errors import about
from library.checkpoints.model_lookup import existing
from library.options.output import prompts
from networks import lora
from tools.quickstart.toy_world import ImageArray, look_at, parse_caption

SAMPLING_STEPS = 20
GUIDANCE_SCALE = 2.0
BATCH_SIZE = 50


@dataclass(frozen=True)
class Prompt:
    """One image to sample: a caption and the seed of its noise."""

    caption: str
    seed: int


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file in the format of --sample_prompts; a prompt without a seed gets its position in the file.

    Raises UserError if the file has no prompts.
    """
    specs = prompts.read_prompts(path)
    if not specs:
        raise about("--prompts", path)(
            "contains no prompts", 'write one per line, e.g. "a large red star on a white background"'
        )
    return [Prompt(spec.prompt, number if spec.seed is None else spec.seed) for number, spec in enumerate(specs)]


def load_pipeline(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a diffusers folder of Stable Diffusion 1.x with DDIM sampling, without network access."""
    from transformers import CLIPTextModel, CLIPTokenizer, logging

    logging.set_verbosity_error()  # it warns of image processors that nothing here uses
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    # StableDiffusionPipeline.from_pretrained of diffusers before 0.38 runs Python files of a folder unasked.
    parts: dict[str, type[Any]] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    models = {
        name: kind.from_pretrained(str(existing("--base", f"{base}/{name}")), torch_dtype=dtype, local_files_only=True)
        for name, kind in parts.items()
    }
    pipeline = StableDiffusionPipeline(
        **models,
        tokenizer=CLIPTokenizer.from_pretrained(str(existing("--base", f"{base}/tokenizer")), local_files_only=True),
        scheduler=DDIMScheduler.from_pretrained(str(existing("--base", f"{base}/scheduler")), local_files_only=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(desc="sample", mininterval=5)
    return pipeline


def sample(
    pipeline: Any, prompts: Sequence[Prompt], guidance: float = GUIDANCE_SCALE, num_steps: int = SAMPLING_STEPS
) -> list[ImageArray]:
    """Sample one image (64, 64, 3) per prompt; each depends only on its own seed."""
    drawn: list[ImageArray] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        images = pipeline(
            [prompt.caption for prompt in batch],
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in batch],
            output_type="np",
        ).images
        drawn += list(np.rint(images * 255).astype(np.uint8))
    return drawn


def find_right(images: Sequence[ImageArray], prompts: Sequence[Prompt]) -> list[bool]:
    """Return for each image whether it has the shape, colour, background and style of its prompt."""
    return [look_at(image).shows(parse_caption(prompt.caption)) for image, prompt in zip(images, prompts, strict=True)]


def count_right(images: Sequence[ImageArray], prompts: Sequence[Prompt]) -> int:
    """Return the number of images with the shape, colour, background and style of their prompt."""
    return sum(find_right(images, prompts))


def merge_lora(pipeline: Any, weights: dict[str, Tensor], strength: float = 1.0) -> None:
    """Merge an adapter file of any kind into the pipeline's weights.

    Raises UserError for an adapter of another base model.
    """
    modules = view([pipeline.text_encoder], pipeline.unet)
    network, _ = lora.create_network_from_weights(strength, "--lora", None, *modules, weights, for_inference=True)
    network.merge_to(*modules, weights)
