"""The call of a denoiser with the features of captions."""

from typing import Any

from torch import Tensor, nn

from library.diffusion.references import references_in
from library.protocols import Predict
from library.types import Batch, Conditioning, Noised


def build_predict(*keys: str, has_references: bool = False, takes_timesteps: bool = False, **inputs: Any) -> Predict:
    """Return the prediction of a denoiser that takes latents, noise levels and the features `keys`, in this order.

    With `has_references` the reference images follow; `takes_timesteps` gives it timesteps of 0 to 1000 for the levels.
    `inputs` are further arguments by name. The output is the denoiser's, in the shape of the latents.
    """

    def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
        levels_B = noised.timesteps_B if takes_timesteps else noised.sigmas_B
        features = [conditioning[key] for key in keys]
        references = [references_in(conditioning)] if has_references else []
        output_BCHW: Tensor = denoiser(noised.latents_BCHW, levels_B, *features, *references, **inputs)
        return output_BCHW

    return predict
