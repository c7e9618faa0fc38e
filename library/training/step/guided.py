"""The loss that keeps the guidance of a distilled model.

A distilled model predicts g = u + s (c - u) in one call; c and u are predictions of the model it was distilled from.
Fitting g itself to the usual target, which c fits, would undo the distillation. Fitting (g + (s - 1) u) / s, which is
c, keeps it. The weights sum to one, so one formula serves noise, v and velocities of either sign.

Letters: B samples, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from library.data.description.preservation import PRESERVATION
from library.diffusion.guidance import extrapolate
from library.memory.devices import send
from library.protocols import Objective
from library.training.step.context import StepContext
from library.types import Batch, Conditioning, Noised, plain_caption

Undo = Callable[[Tensor], Tensor]
"""Maps the denoiser's output for the captions to the one that is fitted to the target, float32."""


def prepare_guidance_loss(
    context: StepContext, objective: Objective, batch: Batch, noised: Noised, condition: Callable[[Batch], Conditioning]
) -> Undo | None:
    """Predict for the unconditional caption, adapter on, without gradient, and return how to undo the guidance; None if
    no sample of the batch needs it.

    Call before the captions are predicted, while no activations are kept for the backward pass.
    """
    scale, caption = context.guidance.guidance_scale_of_loss, context.guidance.guidance_loss_caption
    if scale is None or batch.concept is not None:
        return None
    is_guided = [
        plain_caption(text) not in ("", caption) and not attributes.get(PRESERVATION)
        for text, attributes in zip(batch.captions, batch.attributes, strict=True)
    ]
    # With a sharded model all ranks run the same passes, whatever their batches hold.
    if not any(is_guided) and context.models.sharded is None:
        return None
    unconditional = replace(batch, captions=[caption] * len(batch.keys), conditioning=batch.unconditional)
    with torch.no_grad(), context.autocast():
        conditioning = condition(unconditional)
        context.network.set_noise_levels(objective.noise_levels(noised))
        u_BCHW = context.arch.predict(context.models.denoiser, noised, conditioning, unconditional).float()
    is_guided_B111 = send(torch.tensor(is_guided), u_BCHW.device).view(-1, 1, 1, 1)

    def undo(g_BCHW: Tensor) -> Tensor:
        return torch.where(is_guided_B111, extrapolate(u_BCHW, g_BCHW.float(), 1 / scale), g_BCHW.float())

    return undo
