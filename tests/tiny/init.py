"""Weights for tiny models: random, never ones or zeros, and scaled so that signals keep their size."""

import torch
from torch import Tensor, nn


def fixed_init(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return a state dict for `module` (which may be on the meta device); equal seeds give equal weights.

    Matrices and kernels are normal with variance 1 / fan-in, norm weights are around 1, biases around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: init_tensor(name, tensor, generator) for name, tensor in sorted(module.state_dict().items())}


def init_tensor(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if noise.ndim >= 2:
        return noise / noise[0].numel() ** 0.5
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
