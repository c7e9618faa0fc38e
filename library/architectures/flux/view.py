"""FLUX.1 as network modules see it: module paths are the names in adapter files."""

from collections.abc import Sequence

from torch import nn

from library.models.clip import clip_body
from library.models.clip_view import ClipView


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """([CLIP-L, T5 where it is there], denoiser) for `create_network` and `apply_to`.

    The denoiser's own paths are those of files.
    """
    clip = [ClipView(clip_body(encoder)) for encoder in text_encoders[:1]]
    return [*clip, *text_encoders[1:]], denoiser
