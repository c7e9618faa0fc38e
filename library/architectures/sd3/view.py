"""Stable Diffusion 3 as network modules see it: module paths are the names in adapter files."""

from collections.abc import Sequence

from torch import nn

from library.models.clip import clip_body
from library.models.clip_view import ClipView


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """([CLIP-L, CLIP-G, T5 where there is one], denoiser) for `create_network` and `apply_to`."""
    clips = [ClipView(clip_body(encoder)) for encoder in text_encoders[:2]]
    return [*clips, *text_encoders[2:]], denoiser
