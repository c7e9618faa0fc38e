"""The mean loss of each sample under its mask."""

from torch import Tensor
from torch.nn.functional import interpolate

from library.memory.devices import send


def compute_masked_means(loss_BCHW: Tensor, masks_B1HW: Tensor | None) -> Tensor:
    """Return each sample's loss times its mask (given in pixels), averaged over all latent values; shape B."""
    if masks_B1HW is not None:
        masks_B1HW = send(masks_B1HW, loss_BCHW.device)
        loss_BCHW = loss_BCHW * interpolate(masks_B1HW, size=loss_BCHW.shape[-2:], mode="area")
    # As in sd-scripts the mean counts masked values too, so a small mask means a small loss.
    return loss_BCHW.flatten(1).mean(1)
