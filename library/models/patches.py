"""Conversion between latents and tokens of P x P latents, and the mask of keys.

Letters: B samples, C channels, H and W sides of the latent, h and w sides in patches, F = P P C features of a token, L
text tokens, I image tokens, T all tokens (text first).
"""

import torch
from torch import Tensor


def patchify(latents_BCHW: Tensor, patch: int, channels_last: bool = False) -> Tensor:
    """Turn each square of P x P latents into a token, in row order; shape (B, h w, F), channels outermost or
    innermost."""
    B, C, H, W = latents_BCHW.shape
    grid = latents_BCHW.view(B, C, H // patch, patch, W // patch, patch)
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return grid.permute(*order).reshape(B, (H // patch) * (W // patch), C * patch**2)


def unpatchify(tokens_BTF: Tensor, h: int, w: int, patch: int, channels_last: bool = False) -> Tensor:
    """Invert `patchify`; shape BCHW."""
    B, _, F = tokens_BTF.shape
    C = F // patch**2
    if channels_last:
        grid = tokens_BTF.view(B, h, w, patch, patch, C).permute(0, 5, 1, 3, 2, 4)
    else:
        grid = tokens_BTF.view(B, h, w, C, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(B, C, h * patch, w * patch)


def key_mask(is_text_BL: Tensor, num_patches: int) -> Tensor:
    """Return the mask of keys, (B, 1, 1, T): the text's tokens as given, and all of the image's."""
    image_BI = is_text_BL.new_ones((len(is_text_BL), num_patches))
    return torch.cat([is_text_BL, image_BI], dim=1)[:, None, None]
