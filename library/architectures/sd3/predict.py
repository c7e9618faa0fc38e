"""Prediction by Stable Diffusion 3's denoiser.

Letters: B samples, C channels, H and W sides of the latent, T text positions, E width of the text features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from library.architectures.sd3.text import CLIP_PLACES
from library.types import Batch, Conditioning, Noised


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents."""
    model: Any = denoiser
    context_BTE = join_context(conditioning, model.config.context_width)
    corner = None
    if (shares_B2 := conditioning.get("position")) is not None:
        h, w = (side // model.config.patch for side in noised.latents_BCHW.shape[-2:])
        corner = locate_corner(shares_B2, h, w, model.table_side(h, w))
    velocity_BCHW: Tensor = model(
        noised.latents_BCHW, noised.timesteps_B, context_BTE, conditioning["lg_pooled"], corner
    )
    return velocity_BCHW


def join_context(conditioning: Conditioning, width: int) -> Tensor:
    """Concatenate the features of both CLIPs, padded with zeros to the width of T5's, and T5's features.

    Without T5 there are zeros in its place, at as many positions as CLIP has.
    """
    lg_BTE = conditioning["lg_out"]
    lg_BTE = pad(lg_BTE, (0, width - lg_BTE.shape[-1]))
    t5_BTE = conditioning.get("t5_out")
    if t5_BTE is None:
        t5_BTE = lg_BTE.new_zeros(len(lg_BTE), CLIP_PLACES, width)
    return torch.cat([lg_BTE, t5_BTE.to(lg_BTE.dtype)], dim=1)


def locate_corner(shares_B2: Tensor, h: int, w: int, side: int) -> tuple[int, int]:
    """Return top and left of h x w patches in a table of positions; each row of `shares_B2` is the same share of
    free space."""
    # Shares are below 1, so the last corner is `side - h` rows down. They are on the host: nothing waits for the GPU.
    top, left = shares_B2[0].tolist()
    return int(top * (side - h + 1)), int(left * (side - w + 1))
