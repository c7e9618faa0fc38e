"""Random changes of the conditioning: dropped text encoders and shifted image positions.

Letters: B samples, T text positions, E width of the text features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.devices import send
from library.types import Conditioning

Parts = Mapping[str, tuple[int, int | None]]  # name in the conditioning -> channel range of an encoder


@dataclass(frozen=True)
class Variation:
    """Dropout rates of the text encoders, and the share of batches that are placed at random in the table of positions.

    Random numbers are drawn in this order: for each sample CLIP-L, CLIP-G and T5, then one for shifting the batch and
    two for its place. Each call draws all of them, so that no rate affects the draws of another.
    """

    clip_l: float
    clip_g: float
    t5: float
    position: float
    clip_l_width: int
    clip_l_pooled_width: int

    def __call__(self, conditioning: Conditioning, generator: torch.Generator) -> Conditioning:
        """Return the conditioning of one training step; dropped features are zero."""
        B = len(conditioning["lg_out"])
        drops_EB = torch.rand(3, B, generator=generator) < torch.tensor([self.clip_l, self.clip_g, self.t5])[:, None]
        is_shifted = torch.rand((), generator=generator).item() < self.position
        place_2 = torch.rand(2, generator=generator)
        changed = dict(conditioning)
        for parts, drops_B in zip(self._parts(), drops_EB, strict=True):
            for name, channels in parts.items():
                # T5's features are missing if the run has no T5.
                if name in changed and drops_B.any():
                    changed[name] = zero_range(changed[name], channels, drops_B)
        # All samples share the place, because the denoiser cuts one window of the table for a batch.
        if is_shifted:
            changed["position"] = place_2.expand(B, 2)
        return changed

    def _parts(self) -> tuple[Parts, Parts, Parts]:
        """Return the features of each encoder, with its range of channels."""
        out, pooled = self.clip_l_width, self.clip_l_pooled_width
        return (
            {"lg_out": (0, out), "lg_pooled": (0, pooled), "clip_l_attn_mask": (0, None)},
            {"lg_out": (out, None), "lg_pooled": (pooled, None), "clip_g_attn_mask": (0, None)},
            {"t5_out": (0, None), "t5_attn_mask": (0, None)},
        )


def zero_range(features: Tensor, channels: tuple[int, int | None], drops_B: Tensor) -> Tensor:
    """Zero the given range of the features' last axis in dropped samples."""
    is_kept = torch.ones(features.shape[-1], dtype=torch.bool)
    is_kept[slice(*channels)] = False
    # The draws are on the host, so the mask is made there and sent without waiting for the GPU.
    keeps = is_kept | ~drops_B.view(-1, *(1,) * (features.dim() - 1))
    return features * send(keeps.to(features.dtype), features.device)
