"""Conversion of decoded images and masks to tensors."""

import torch
from torch import Tensor

from library.data.decoding.images import Pixels


def to_mask(values_HW: Pixels) -> Tensor:
    """Scale uint8 0..255 to float32 0..1."""
    return torch.from_numpy(values_HW).float() / 255


def to_pixels(image_HWC: Pixels) -> Tensor:
    """Convert uint8 HWC, 0..255, to float32 CHW, -1..1."""
    return torch.from_numpy(image_HWC).permute(2, 0, 1).float() / 127.5 - 1
