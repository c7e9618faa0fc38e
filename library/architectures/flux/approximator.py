"""Chroma's (lodestones 2025) replacement of FLUX.1's modulation layers: one network that computes all rows of
modulation from the noise level, in the layout of the original checkpoints.

Letters: B samples, V rows of modulation, M model width, F input features, A width of the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.architectures.flux.layers import APPROXIMATOR
from library.models.double_stream import MLPEmbedder, RMSNorm
from library.models.shapes import ShapeReader
from library.models.sinusoids import sinusoids


@dataclass(frozen=True)
class ApproximatorConfig:
    """The sizes of the network, inferred from the shapes of a checkpoint."""

    in_features: int  # a quarter for the noise level, a quarter for the guidance, half for the row's index
    hidden_width: int
    depth: int


def read_approximator(shapes: Mapping[str, tuple[int, ...]]) -> ApproximatorConfig | None:
    """Read the sizes from shapes, names without prefix; None if the checkpoint has no approximator.

    Raises UserError for a missing name.
    """
    if not any(name.startswith(APPROXIMATOR) for name in shapes):
        return None
    read = ShapeReader("Chroma", shapes)
    hidden_width, in_features = read.shape(f"{APPROXIMATOR}in_proj.weight")
    return ApproximatorConfig(in_features, hidden_width, read.count(f"{APPROXIMATOR}layers"))


def modulation_inputs(sigmas_B: Tensor, guidance_B: Tensor, num_rows: int, in_features: int) -> Tensor:
    """Return the input for each row, float32, shape BVF: noise level and guidance, equal for all rows, then the
    row's index."""
    # All three inputs are scaled by 1000, the row's number too, as in diffusers' class.
    features_BF = [sinusoids(1000 * values_B.float(), in_features // 4) for values_B in (sigmas_B, guidance_B)]
    rows_VF = sinusoids(1000 * torch.arange(num_rows, device=sigmas_B.device), in_features // 2)
    features_BVF = [features[:, None].expand(-1, num_rows, -1) for features in features_BF]
    return torch.cat([*features_BVF, rows_VF.expand(len(sigmas_B), -1, -1)], dim=-1)


class Approximator(nn.Module):
    """The network that computes modulation. Adapters find its layers by this class name if they are requested.

    The modulation of a frozen model depends on nothing trainable, so autograd saves nothing of it.
    """

    def __init__(self, config: ApproximatorConfig, width: int) -> None:
        super().__init__()
        hidden = config.hidden_width
        self.in_proj = nn.Linear(config.in_features, hidden)
        self.layers = nn.ModuleList(MLPEmbedder(hidden, hidden) for _ in range(config.depth))
        self.norms = nn.ModuleList(RMSNorm(hidden) for _ in range(config.depth))
        self.out_proj = nn.Linear(hidden, width)

    def forward(self, inputs_BVF: Tensor) -> Tensor:
        """Return the rows of modulation, BVM."""
        x_BVA = self.in_proj(inputs_BVF)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x_BVA = x_BVA + layer(norm(x_BVA))
        rows_BVM: Tensor = self.out_proj(x_BVA)
        return rows_BVM
