"""Prediction by Stable Diffusion XL's U-Net."""

import torch
from torch import Tensor, nn

from library.memory.devices import send
from library.models.unet.unet import unet_input
from library.types import Batch, Conditioning, Noised


def predict(
    denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch, *, uses_real_crops: bool = False
) -> Tensor:
    """Return the predicted noise, or velocity for a v-prediction model, in the shape of the latents.

    The denoiser gets both encoders' concatenated features, the pooled vector, and the sizes of the images.
    """
    text_BTW = torch.cat([conditioning["hidden_state1"], conditioning["hidden_state2"]], dim=-1)
    pooled_BP = conditioning["pool2"]
    prediction_BCHW: Tensor = denoiser(
        unet_input(noised, conditioning),
        noised.timesteps_B,
        encoder_hidden_states=text_BTW,
        added_cond_kwargs={
            "text_embeds": pooled_BP,
            "time_ids": send(format_sizes(batch, uses_real_crops), pooled_BP.device),
        },
    ).sample
    return prediction_BCHW


def format_sizes(batch: Batch, uses_real_crops: bool) -> Tensor:
    """Return original height and width, crop top and left, target height and width, float32."""
    if not uses_real_crops or batch.crops_B2 is None:
        return batch.sizes_B6
    return torch.cat([batch.sizes_B6[:, :2], batch.crops_B2, batch.sizes_B6[:, 4:]], dim=1)
