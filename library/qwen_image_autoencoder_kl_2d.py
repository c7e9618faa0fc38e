"""Functions of sd-scripts' library.qwen_image_autoencoder_kl_2d for programs that import it; nothing here calls
them."""

import torch
from torch import nn

from library.models.vae.qwen_image import open_vae
from library.models.vae.qwen_image_2d import load_vae_for_images


def load_vae(
    vae_path: str,
    device: str | torch.device = "cpu",
    disable_mmap: bool = True,
    spatial_chunk_size: int | None = None,
    disable_cache: bool = False,
) -> nn.Module:
    """Return Qwen-Image's VAE with two-dimensional layers, frozen, in float32.

    `disable_mmap`, `spatial_chunk_size` and `disable_cache` have no effect. Raises UserError for another file.
    """
    return load_vae_for_images(open_vae("Qwen-Image", vae_path), torch.float32).to(device)


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
