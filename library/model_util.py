"""Functions of sd-scripts' library.model_util for programs that import it; nothing here calls them."""

import argparse

import torch
from torch import nn

from library.architectures.sd.layers import view
from library.architectures.sd.load import open_loader
from library.checkpoints.headers import is_safetensors
from library.options.train import TrainOptions

__all__ = ["is_safetensors", "load_models_from_stable_diffusion_checkpoint"]


def load_models_from_stable_diffusion_checkpoint(
    v2: bool,
    ckpt_path: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    unet_use_linear_projection_in_v2: bool = True,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return (text encoder, VAE, U-Net) of an SD 1.x or 2.x checkpoint, float32 if `dtype` is None.

    The layers of text encoder and U-Net are named by their paths in adapter files. SD 2.x gets the kind of projection
    layers that the checkpoint has; `unet_use_linear_projection_in_v2` is ignored. Raises UserError for another model.
    """
    values = TrainOptions.defaults() | {"pretrained_model_name_or_path": ckpt_path, "v2": v2}
    loader = open_loader(TrainOptions.from_args(argparse.Namespace(**values)))
    text_encoder, unet = view(loader.text_encoders(), loader.denoiser())
    assert isinstance(text_encoder, nn.Module)  # would be a list only for a base model without encoders
    return text_encoder.to(device, dtype), loader.vae().to(device, dtype), unet.to(device, dtype)


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
