"""The layers of Qwen-Image's VAE as a single picture needs them.

Its convolutions look back in time: before the first frame lie zeros, so of a kernel's places in time only the last
meets anything, and a convolution in two dimensions with these weights computes the same. Its norms, of each pixel
alone, are computed in float32, which for a whole picture takes more than the convolutions do. Letters: T frames, of
which there is one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, normalize

NORM_STRIPES = 16  # a stripe's copies in float32 are then an eighth of the picture's bf16


class PictureConv(nn.Module):
    """A convolution of the VAE for one frame.

    It keeps the whole kernel under its name: so a module of these is, by its weights, the VAE that it was made of, and
    latents that were cached with either are those of the other.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = tuple(side // 2 for side in conv.kernel_size[1:])

    def forward(self, x_BCTHW: Tensor, earlier: None = None) -> Tensor:
        """Shape BCTHW."""
        assert x_BCTHW.shape[2] == 1, "a picture is one frame"
        return conv2d(x_BCTHW[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding)[:, :, None]


class StripedNorm(nn.Module):
    """A norm of the VAE, stripe by stripe of the picture: to the bit what it gives for the whole."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.gamma, self.scale = norm.gamma, norm.scale

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of `x`, whose second axis are channels and whose last are rows and columns."""
        y = torch.empty_like(x)
        for part, stripe in zip(y.chunk(NORM_STRIPES, dim=-2), x.chunk(NORM_STRIPES, dim=-2), strict=True):
            wide = stripe.float() if x.dtype.itemsize < 4 else stripe
            part.copy_(normalize(wide, dim=1).to(x.dtype) * self.scale * self.gamma)
        return y


def take_pictures_alone(vae: Any) -> Any:
    """Give diffusers' AutoencoderKLQwenImage a `PictureConv` for each of its convolutions and a `StripedNorm` for each
    norm, in place; its weights and their names stay. The convolutions that join frames are left: a picture does not
    come by them."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm

    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QwenImageCausalConv3d) and name != "time_conv":
                setattr(module, name, PictureConv(child))
            elif isinstance(child, QwenImageRMS_norm):
                setattr(module, name, StripedNorm(child))
    return vae
