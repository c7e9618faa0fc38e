"""Functions of sd-scripts' library.sdxl_model_util for programs that import it; nothing here calls them."""

import argparse

import torch
from torch import nn

from library.architectures.sdxl.layers import build_view
from library.architectures.sdxl.load import open_loader, recognise_unet_layout
from library.architectures.sdxl.options import SdxlOptions


def load_models_from_sdxl_checkpoint(
    model_version: str | None,
    ckpt_path: str,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    disable_mmap: bool = False,
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module, None, None]:
    """Return (CLIP-L, CLIP-G, VAE, U-Net, None, None) of an SDXL checkpoint, float32 if `dtype` is None.

    The layers of text encoders and U-Net are named by their paths in adapter files. The last two values, CLIP's logit
    scale and the number of steps that the checkpoint was trained, are not used in training. `model_version` and
    `disable_mmap` have no effect. Raises UserError for another model.
    """
    values = SdxlOptions.defaults() | {"pretrained_model_name_or_path": ckpt_path}
    loader = open_loader(SdxlOptions.from_args(argparse.Namespace(**values)))
    encoders, unet = build_view(recognise_unet_layout(loader.parts.unet))(loader.text_encoders(), loader.denoiser())
    assert isinstance(encoders, list)
    clip_l, clip_g, vae, unet = (model.to(map_location, dtype) for model in (*encoders, loader.vae(), unet))
    return clip_l, clip_g, vae, unet, None, None


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
