"""What the assemblies of U-Net models share."""

from collections.abc import Sequence
from typing import Any

from library.checkpoints.base_model_spec import BaseModelSpec
from library.diffusion.objective import build_ddpm
from library.models.unet.preview import build_unet_preview
from library.models.unet.unet import run_unet_blocks_with, unet_chains, unet_stacks
from library.models.unet_loader import UnetLoader
from library.options.train import TrainOptions
from library.protocols import Predict, TextPipeline


def unet_parts(
    options: TrainOptions,
    loader: UnetLoader,
    text: TextPipeline,
    prompts: TextPipeline,
    predict: Predict,
    specs: Sequence[BaseModelSpec],
) -> dict[str, Any]:
    """Return the parts of an `Architecture` that follow from a U-Net model's loader, text and prediction; `prompts`
    reads preview prompts, with emphasis."""
    noise, predicts_velocity = options.noise, options.model.v_parameterization
    sampler = options.preview.sample_sampler
    return {
        "load": loader,
        "text": text,
        "objective": build_ddpm(noise, options.loss, predicts_velocity),
        "predict": predict,
        "preview": build_unet_preview(sampler, predicts_velocity, noise.zero_terminal_snr, prompts, predict),
        "specs": specs,
        "run_blocks_with": run_unet_blocks_with,
        "stacks": unet_stacks,
        "chains": unet_chains,
        "inpaints": loader.inpaints,
    }
