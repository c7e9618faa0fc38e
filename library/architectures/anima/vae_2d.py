"""The convolutions of Qwen-Image's VAE as a single picture sees them.

Over time they look back: before the first frame lie zeros, so of a kernel's places in time only the last meets
anything, and a convolution in two dimensions with these weights computes the same. Letters: T frames, of which there is
one.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import conv2d


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


def take_pictures_alone(vae: Any) -> Any:
    """Give diffusers' AutoencoderKLQwenImage a `PictureConv` for each of its convolutions, in place; its weights and
    their names stay. Those that join frames are left: a picture does not come by them."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QwenImageCausalConv3d) and name != "time_conv":
                setattr(module, name, PictureConv(child))
    return vae
