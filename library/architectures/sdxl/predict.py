"""One call of Stable Diffusion XL's U-Net."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.types import Batch, Conditioning, Noised


@dataclass(frozen=True)
class SdxlPredict:
    """The U-Net with both encoders' features side by side, the pooled vector, and the sizes of the pictures."""

    tells_real_crops: bool = False

    def __call__(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
        """The predicted noise, or velocity for a v-prediction model, in the shape of the latents."""
        text_BTW = torch.cat([conditioning["hidden_state1"], conditioning["hidden_state2"]], dim=-1)
        pooled_BP = conditioning["pool2"]
        prediction_BCHW: Tensor = denoiser(
            noised.latents_BCHW,
            noised.timesteps_B,
            encoder_hidden_states=text_BTW,
            added_cond_kwargs={"text_embeds": pooled_BP, "time_ids": self.sizes(batch).to(pooled_BP.device)},
        ).sample
        return prediction_BCHW

    def sizes(self, batch: Batch) -> Tensor:
        """Original height and width, crop top and left, target height and width; float32, B6."""
        if not self.tells_real_crops or batch.crops_B2 is None:
            return batch.sizes_B6
        return torch.cat([batch.sizes_B6[:, :2], batch.crops_B2, batch.sizes_B6[:, 4:]], dim=1)
