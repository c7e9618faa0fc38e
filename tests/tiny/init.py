"""Weights for tiny models: random, never ones or zeros, and sized so that a signal keeps its size on its way."""

import torch
from torch import Tensor, nn


def fixed_init(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict for `module` (which may lie on the meta device), the same for the same seed.

    Matrices and kernels are normal with variance 1 / fan-in, norm weights lie around 1, biases around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: init_tensor(name, tensor, generator) for name, tensor in sorted(module.state_dict().items())}


def init_tensor(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if noise.ndim >= 2:
        return noise / noise[0].numel() ** 0.5
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
