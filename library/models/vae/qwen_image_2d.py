"""Two-dimensional layers of Qwen-Image's VAE for single images.

Its convolutions are causal in time: zeros precede the first frame, so only the last temporal slice of a kernel meets
data, and a two-dimensional convolution with this slice computes the same. Its norms work per pixel in float32, which
takes more memory for a whole image than the convolutions do. Letters: T frames, here one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, normalize

from library.models.loading import MaybeComponent
from library.models.vae.qwen_image import load_vae

NORM_STRIPES = 16  # a stripe's float32 copies then take an eighth of the bf16 image's memory


class ImageConv(nn.Module):
    """A convolution of the VAE for one frame.

    It keeps the whole kernel under its name: the module has the weights of the VAE it was made from, and latents cached
    by either are valid for both.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = tuple(size // 2 for size in conv.kernel_size[1:])

    def forward(self, x_BCTHW: Tensor, earlier: None = None) -> Tensor:
        """Return the output, shape BCTHW."""
        assert x_BCTHW.shape[2] == 1, "an image is one frame"
        return conv2d(x_BCTHW[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding)[:, :, None]


class StripedNorm(nn.Module):
    """A norm of the VAE computed in stripes of the image, with a bit-identical result."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.gamma, self.scale = norm.gamma, norm.scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` over its second axis, the channels; its last two axes are rows and columns."""
        y = torch.empty_like(x)
        for part, stripe in zip(y.chunk(NORM_STRIPES, dim=-2), x.chunk(NORM_STRIPES, dim=-2), strict=True):
            wide = stripe.float() if x.dtype.itemsize < 4 else stripe
            part.copy_(normalize(wide, dim=1).to(x.dtype) * self.scale * self.gamma)
        return y


def load_vae_for_images(component: MaybeComponent, dtype: torch.dtype) -> nn.Module:
    """Load the VAE in `dtype`, frozen, on the CPU, with two-dimensional layers."""
    vae: nn.Module = replace_layers_for_images(load_vae(component, dtype))
    return vae


def replace_layers_for_images(vae: Any) -> Any:
    """Replace the convolutions of diffusers' AutoencoderKLQwenImage by `ImageConv` and its norms by `StripedNorm`, in
    place.

    Weights and their names stay. Convolutions that join frames are kept: images do not pass through them.
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm

    # A list, because the loop changes the tree that it walks.
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QwenImageCausalConv3d) and name != "time_conv":
                setattr(module, name, ImageConv(child))
            elif isinstance(child, QwenImageRMS_norm):
                setattr(module, name, StripedNorm(child))
    return vae
