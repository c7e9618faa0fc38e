"""Lumina Image 2.0 as network modules see it: module paths are the names in adapter files."""

from collections.abc import Sequence

from torch import nn


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """(Gemma 2, denoiser) for `create_network` and `apply_to`; the paths of both are those of files."""
    return (text_encoders[0] if text_encoders else []), denoiser
