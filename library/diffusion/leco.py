"""The training target of LECO: a prompt's prediction is moved along the difference of two other predictions.

Sources: Gandikota et al. 2023, "Erasing Concepts from Diffusion Models" (ESD) and "Concept Sliders". The predictions
are outputs of the denoiser: noise or velocity of a DDPM model, velocity of a flow. At one noise level each is linear in
the estimate of the clean latent, so one formula serves all.

Letters: B samples, C channels, H height, W width.
"""

from torch import Tensor


def concept_target(neutral_BCHW: Tensor, positive_BCHW: Tensor, negative_BCHW: Tensor, push: float) -> Tensor:
    """Return neutral + push * (positive - negative), float32; a negative `push` erases, a positive one enhances."""
    return neutral_BCHW.float() + push * (positive_BCHW.float() - negative_BCHW.float())
