"""Positions of FLUX.2's tokens on its four rotary axes: image, row, column, text."""

import torch
from torch import Tensor

NUM_AXES = 4
REFERENCE_STEP = 10  # between reference images on the first axis


def text_positions(num_tokens: int, device: torch.device) -> Tensor:
    """Return positions of text tokens, shape (L, 4): token i at (0, 0, 0, i)."""
    ids_L4 = torch.zeros(num_tokens, NUM_AXES, dtype=torch.long, device=device)
    ids_L4[:, 3] = torch.arange(num_tokens, device=device)
    return ids_L4


def image_positions(h: int, w: int, device: torch.device, t: int = 0) -> Tensor:
    """Return positions of an image's tokens, shape (h w, 4): row y and column x at (t, y, x, 0).

    The noisy image has t = 0, reference i (from 1) has t = `REFERENCE_STEP` i.
    """
    ids_T4 = torch.zeros(h * w, NUM_AXES, dtype=torch.long, device=device)
    ids_T4[:, 0] = t
    ids_T4[:, 1] = torch.arange(h, device=device).repeat_interleave(w)
    ids_T4[:, 2] = torch.arange(w, device=device).repeat(h)
    return ids_T4
