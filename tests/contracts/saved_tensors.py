"""The tensors that a network would save, and those that the lists of known files expect."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from networks.core.protocol import adopt


def saved_tensors(network: Any) -> dict[str, Tensor]:
    """Return the tensors by their key in the file."""
    return {
        f"{name}.{leaf}": tensor
        for name, adapter in network.adapters.items()
        for leaf, tensor in adapter.change.stored_tensors().items()
    }


def saved_shapes(
    create_network: Callable[..., Any], models: Any, apply_te: bool = True, apply_unet: bool = True, **args: str
) -> dict[str, list[int]]:
    """Return the shapes that a network of rank 4 saves on `models`, (text encoders, denoiser) without weights.

    The adapters are removed from the models afterwards.
    """
    with torch.device("meta"):
        network = create_network(1.0, 4, 1, None, *models, **args)
        adopt(network).apply_to(*models, apply_te, apply_unet)
        network.remove()
        return {key: list(tensor.shape) for key, tensor in saved_tensors(network).items()}


def listed_shapes(facts: Mapping[str, Any], variant: str) -> dict[str, list[int]]:
    """Return the listed shapes of a variant, which the list stores as a difference from its default."""
    difference = facts["variants"][variant]
    unchanged = {key: shape for key, shape in facts["default"].items() if key not in difference["removed"]}
    return {**unchanged, **difference["changed"], **difference["added"]}
