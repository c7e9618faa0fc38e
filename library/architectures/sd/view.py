"""Stable Diffusion 1.x and 2.x as network modules see it: module paths are the names in adapter files."""

from collections.abc import Sequence

from torch import nn

from library.architectures.sd.targets import TARGETS
from library.models.clip import clip_body
from library.models.clip_view import ClipView


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(text encoder, U-Net) for `create_network` and `apply_to`; every layer is the real one."""
    (encoder,) = text_encoders
    denoiser.adapter_targets = TARGETS  # type: ignore[assignment]  # a plain attribute beside the modules
    return ClipView(clip_body(encoder)), denoiser
