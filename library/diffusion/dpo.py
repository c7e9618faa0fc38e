"""Direct preference optimization of diffusion models (Wallace et al. 2023, "Diffusion Model Alignment Using Direct
Preference Optimization", eq. 14), also for the velocity of a flow.

Both images of a pair get the same noise at the same level. With e the mean squared error of a prediction, w the
preferred image, l the rejected one, and ref the reference model, the loss is -log sigmoid(m) of the margin

    m = -beta / 2 * ((e_w - e_w_ref) - (e_l - e_l_ref))

Letters: P pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LEAST_LOSS = 1e-45  # float32 rounds the losses of margins above 103 to 0


def preference_losses(errors_2P: Tensor, reference_2P: Tensor, beta: float) -> Tensor:
    """Return the loss of each pair, float32, shape P, from the errors of the trained model and of the reference. The
    first half of each belongs to the preferred images."""
    gains_2P = reference_2P.float() - errors_2P.float()  # reduction of the error compared with the reference
    preferred_P, rejected_P = gains_2P.chunk(2)
    return -logsigmoid(beta / 2 * (preferred_P - rejected_P))


def invert_losses(losses: Tensor) -> Tensor:
    """Return the margins of these losses, float64: the implicit rewards of the preferred images minus those of the
    rejected ones."""
    losses = losses.double().clamp(min=LEAST_LOSS)
    # This is -log(exp(losses) - 1), without overflow for large losses and without cancellation for small ones.
    return -(losses + torch.log(-torch.expm1(-losses)))


def implicit_accuracy(losses: Tensor, tolerance: float = 1e-6) -> float:
    """Return the share of margins above 0; a margin within `tolerance` of 0, float32's rounding, counts half."""
    margins = invert_losses(losses)
    is_tie = margins.abs() <= tolerance
    return ((margins > 0) & ~is_tie).double().mean().item() + 0.5 * is_tie.double().mean().item()
