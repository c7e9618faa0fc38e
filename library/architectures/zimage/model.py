"""The denoiser of Z-Image (Cai et al. 2025), in the layout of the original checkpoints.

It is NextDiT with learned filler tokens, which pad captions and images to multiples of 32 and are attended to. Module
paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of the
latent, h and w sides in patches, L text tokens, I image tokens, T tokens, M model width, E text width, V width of the
noise level's embedding.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from library.architectures.zimage.layers import TARGETS
from library.memory.devices import send
from library.models.next_dit import JointTransformer, NextDiTConfig, read_sizes
from library.models.patches import key_mask, patchify, unpatchify
from library.models.rotary import Rotary

PATCH = 2
MULTIPLE = 32  # the number of tokens of a caption, and of an image, is padded to a multiple of this
ROPE_BASE = 256
ROPE_SHARES = (2, 3, 3)  # of a head's values, in eighths, that rotate with (token, row, column)
ROPE_STEP = 16  # head widths are multiples, so that every share is an even number of values
TIME_SCALE = 1000


class ZImageConfig(NextDiTConfig):
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """The number of values of a head that rotate with (token, row, column): 32, 48 and 48 of 128."""
        return tuple(self.head_width // 8 * share for share in ROPE_SHARES)


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> ZImageConfig:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    return read_sizes(ZImageConfig, "Z-Image", shapes, ROPE_STEP, is_grouped=False)


class ZImage(JointTransformer):
    """The denoiser: predicts the velocity latent - noise from noisy latents, times and text; time 1 is the image."""

    adapter_targets = TARGETS

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__(
            config,
            Rotary(config.rope_axes, ROPE_BASE),
            lambda: nn.Sequential(nn.Linear(config.time_width, 4 * config.width)),
        )
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.width))
        self.x_pad_token = nn.Parameter(torch.empty(1, config.width))

    def forward(self, latents_BCHW: Tensor, times_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor) -> Tensor:
        """Return the velocity, shape BCHW.

        `times_B` are 1 minus the share of noise: 0 is noise, 1 the image. `text_mask_BL` is 1 for the caption's tokens,
        which precede its padding; it should be on the host, because the lengths are read from it.
        """
        h, w = (side // PATCH for side in latents_BCHW.shape[-2:])
        device, dtype = latents_BCHW.device, self.x_embedder.weight.dtype
        lengths = [int(length) for length in text_mask_BL.sum(1).tolist()]
        filled = [round_up(length) for length in lengths]
        L, num_image = max(filled), round_up(h * w)
        # The text is computed up to the longest caption only, then filled up to the longest multiple of 32.
        txt_BLM = self.cap_embedder(text_BLE[:, : max(lengths)].to(dtype))
        txt_BLM = fill(txt_BLM, self.cap_pad_token, send(filler_mask(lengths, L), device))
        img_BIM = self.x_embedder(patchify(latents_BCHW, PATCH, channels_last=True).to(dtype))
        if h * w < num_image:
            img_BIM = fill(img_BIM, self.x_pad_token, send(filler_mask([h * w] * len(lengths), num_image), device))
        time_BV = self.t_embedder(times_B * TIME_SCALE, dtype)
        positions_BT3 = send(torch.stack([positions(n, L, h, w, num_image) for n in filled]), device)
        rope = self.rotary(positions_BT3[:, None], (L + 2, h, w))
        text_mask = mask = None  # attention has faster kernels without a mask
        if min(filled) < L:
            is_text_BL = send(~filler_mask(filled, L), device)
            text_mask, mask = is_text_BL[:, None, None], key_mask(is_text_BL, num_image)
        img_BIM = self.run_blocks(txt_BLM, img_BIM, time_BV, rope, text_mask, mask)[:, : h * w]
        return unpatchify(self.final_layer(img_BIM, time_BV), h, w, PATCH, channels_last=True)


def round_up(num_tokens: int) -> int:
    return -(-num_tokens // MULTIPLE) * MULTIPLE


def filler_mask(lengths: Sequence[int], num_tokens: int) -> Tensor:
    """Return a mask that is true after the first `lengths` tokens, shape (B, `num_tokens`), on the host."""
    return torch.arange(num_tokens)[None] >= torch.tensor(lengths)[:, None]


def fill(x_BTM: Tensor, token_1M: Tensor, is_filler_BT: Tensor) -> Tensor:
    """Pad `x_BTM` to the length of the mask, and put the token where the mask is true."""
    x_BTM = pad(x_BTM, (0, 0, 0, is_filler_BT.shape[1] - x_BTM.shape[1]))
    return torch.where(is_filler_BT[..., None], token_1M.to(x_BTM.dtype), x_BTM)


def positions(num_text: int, L: int, h: int, w: int, num_image: int) -> Tensor:
    """Return positions of the tokens of one sample, shape (T, 3), on the host.

    Text token i, fillers included, is at (i + 1, 0, 0), row y and column x of the image at (`num_text` + 1, y, x), the
    image's fillers at 0. Positions of text after `num_text` tokens are arbitrary.
    """
    text_L3 = torch.zeros(L, 3, dtype=torch.long)
    text_L3[:, 0] = torch.arange(1, L + 1)
    image_I3 = torch.zeros(num_image, 3, dtype=torch.long)
    # The image follows the caption's own fillers, so its position does not depend on other captions of the batch.
    image_I3[: h * w, 0] = num_text + 1
    image_I3[: h * w, 1] = torch.arange(h).repeat_interleave(w)
    image_I3[: h * w, 2] = torch.arange(w).repeat(h)
    return torch.cat([text_L3, image_I3])
