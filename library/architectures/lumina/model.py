"""The denoiser of Lumina Image 2.0 (NextDiT, Qin et al. 2025), in the layout of the original checkpoints.

Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of
the latent, h and w sides in patches, L text tokens, I image tokens, T tokens, N heads, K heads of keys and values, D
head width, M model width, E text width, V width of the noise level's embedding, F features of a patch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.architectures.lumina.layers import TARGETS
from library.memory.devices import send
from library.models.next_dit import JointTransformer, NextDiTConfig, read_sizes
from library.models.patches import key_mask, patchify, unpatchify
from library.models.rotary import Rotary

PATCH = 2
ROPE_STEP = 6  # head widths are multiples, because three axes share the pairs of a head


class LuminaConfig(NextDiTConfig):
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """The number of values of a head that rotate with (text, row, column): 32 of 96 each."""
        return (self.head_width // 3,) * 3


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> LuminaConfig:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    return read_sizes(LuminaConfig, "Lumina Image 2.0", shapes, ROPE_STEP, is_grouped=True)


class NextDiT(JointTransformer):
    """The denoiser: predicts the velocity latent - noise from noisy latents, times and text; time 1 is the image."""

    adapter_targets = TARGETS

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__(
            config,
            Rotary(config.rope_axes),
            lambda: nn.Sequential(nn.SiLU(), nn.Linear(config.time_width, 4 * config.width)),
        )

    def forward(self, latents_BCHW: Tensor, times_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor) -> Tensor:
        """Return the velocity, shape BCHW.

        `times_B` are 1 minus the share of noise: 0 is noise, 1 the image. `text_mask_BL` is true for the caption's
        tokens, which precede its padding. Padding is never attended to, and positions after the longest caption are not
        computed. The mask should be on the host, because the lengths are read from it.
        """
        h, w = (side // PATCH for side in latents_BCHW.shape[-2:])
        dtype = self.x_embedder.weight.dtype
        num_text_B = text_mask_BL.sum(1).tolist()
        L = max(num_text_B)
        is_text_BL = send(text_mask_BL[:, :L].bool(), latents_BCHW.device)
        img_BIM = self.x_embedder(patchify(latents_BCHW, PATCH, channels_last=True).to(dtype))
        txt_BLM = self.cap_embedder(text_BLE[:, :L].to(dtype))
        time_BV = self.t_embedder(times_B, dtype)
        rope = self.rotary(positions(is_text_BL, h, w)[:, None], (L + 1, h, w))
        text_mask = mask = None  # attention has faster kernels without a mask
        if min(num_text_B) < L:
            text_mask, mask = is_text_BL[:, None, None], key_mask(is_text_BL, h * w)
        img_BIM = self.run_blocks(txt_BLM, img_BIM, time_BV, rope, text_mask, mask)
        return unpatchify(self.final_layer(img_BIM, time_BV), h, w, PATCH, channels_last=True)


def positions(is_text_BL: Tensor, h: int, w: int) -> Tensor:
    """Return positions of tokens, shape (B, T, 3): token i of a caption at (i, 0, 0), row y and column x of the image
    at (n, y, x), where n is the number of tokens of its caption. Positions of padding are arbitrary."""
    B, L = is_text_BL.shape
    device = is_text_BL.device
    text_BL3 = torch.zeros(B, L, 3, dtype=torch.long, device=device)
    text_BL3[..., 0] = torch.arange(L, device=device)
    image_BI3 = torch.zeros(B, h * w, 3, dtype=torch.long, device=device)
    image_BI3[..., 0] = is_text_BL.sum(1, keepdim=True)
    image_BI3[..., 1] = torch.arange(h, device=device).repeat_interleave(w)
    image_BI3[..., 2] = torch.arange(w, device=device).repeat(h)
    return torch.cat([text_BL3, image_BI3], dim=1)
