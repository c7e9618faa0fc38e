"""Views of base models for network modules, in which every layer is the real one under its own path."""

from collections.abc import Sequence

from torch import nn


def view_denoiser(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], denoiser) for `create_network` and `apply_to`; the text encoders get no adapters."""
    return [], denoiser


def view_both(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """Return (text encoder, denoiser) for `create_network` and `apply_to`, [] for a text encoder that is not loaded."""
    return text_encoders[0] if text_encoders else [], denoiser
