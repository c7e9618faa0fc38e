"""Anima as network modules see it: module paths are the names in adapter files."""

from collections.abc import Sequence

from torch import nn


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """(Qwen3, denoiser) for `create_network` and `apply_to`; [] where no text encoder is loaded."""
    return text_encoders[0] if text_encoders else [], denoiser
