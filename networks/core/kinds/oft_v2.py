"""OFT as in PEFT and OneTrainer: layer inputs rotated in blocks by small orthogonal matrices.

Letters: N inputs of one output, D blocks, b block size, n = b (b - 1) / 2 angles of a block.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.options.declared import declare
from networks.core.arguments.common import DropoutArguments
from networks.core.arguments.network_arguments import NetworkArguments, NetworkSettings
from networks.core.arguments.values import NUMBER, SWITCH, UNIT
from networks.core.changes.adapter import Adapter
from networks.core.changes.blocks import REFUSED, block_size_for, refuse_magnitudes, resolve_blocks, row_length
from networks.core.changes.change import Change, ModuleTensors
from networks.core.changes.dropout import NO_DROPOUT, Dropout
from networks.core.changes.orthogonal import Orthogonal
from networks.core.changes.request import ChangeRequest
from networks.core.registry.adapter_kind import AdapterKind, StartStep
from networks.core.registry.key_layout import KeyLayout

logger = logging.getLogger(__name__)

ANGLES = "oft_R.weight"
DEFAULT_BLOCK_SIZE = 32


class OftV2(nn.Module):
    """OFT (Qiu et al. 2023, arXiv:2306.07280; 2025, arXiv:2506.19847): D blocks 1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4.

    This is the Cayley transform (1 + Q) / (1 - Q) with the Neumann series of the inverse truncated, so the blocks are
    orthogonal for small angles only. `oft_R.weight` (D, n) holds the upper triangle of each skew-symmetric Q, row by
    row; it is (1, n) if all inputs share one block. It starts at zero, in float32.

    With `eps` (COFT) the norm of each Q is limited to eps / sqrt(D). Larger ones are scaled down in every call, and
    permanently by `limit_`.
    """

    exact: tuple[str, ...] = ()

    def __init__(self, angles_Dn: Tensor, eps: float | None = None) -> None:
        super().__init__()
        self.block_size = size_of_triangle(angles_Dn.shape[1])
        self.eps = eps
        self.oft_R = nn.Module()
        self.oft_R.weight = nn.Parameter(angles_Dn)

    def angles(self, scalar: Tensor | float) -> Tensor:
        vector_Dn = self._limited(scalar)
        row, column = torch.triu_indices(self.block_size, self.block_size, 1, device=vector_Dn.device)
        upper = vector_Dn.new_zeros(len(vector_Dn), self.block_size**2)
        upper = upper.index_copy(1, row * self.block_size + column, vector_Dn)
        upper = upper.view(1, -1, self.block_size, self.block_size)
        return upper - upper.mT

    def residuals(self, angles_FDbb: Tensor) -> Tensor:
        square = angles_FDbb @ angles_FDbb
        return 2 * (angles_FDbb + square + square @ angles_FDbb) + square @ square

    def output_scales(self) -> Tensor | None:
        return None

    @torch.no_grad()
    def start_moving(self) -> None:
        nn.init.normal_(self._weight, std=1e-2)

    @torch.no_grad()
    def scale_(self, ratio: Tensor, scalar: Tensor | float) -> None:
        self.limit_(scalar)
        self._weight.mul_(ratio.to(self._weight))

    def in_files(self, scalar: Tensor | float) -> Mapping[str, Tensor]:
        return {ANGLES: self._limited(scalar).to(self._weight.dtype)}

    @torch.no_grad()
    def limit_(self, scalar: Tensor | float) -> None:
        """Scale the parameters down to the limit of COFT, if there is one."""
        if self.eps is None:
            return
        vector_Dn = self._weight.to(torch.promote_types(self._weight.dtype, torch.float32)) * scalar
        self._weight.mul_(self._ratios(vector_Dn).to(self._weight.dtype))

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.oft_R.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _limited(self, scalar: Tensor | float) -> Tensor:
        """Return the angles within the limit, (D, n), in float32 or wider."""
        vector_Dn = self._weight.to(torch.promote_types(self._weight.dtype, torch.float32)) * scalar
        return vector_Dn if self.eps is None else vector_Dn * self._ratios(vector_Dn)

    def _ratios(self, vector_Dn: Tensor) -> Tensor:
        """Return the factor (D, 1) that brings each block within the limit. It has no gradient, as in a projection."""
        assert self.eps is not None
        limit = self.eps / len(vector_Dn) ** 0.5
        lengths_D1 = vector_Dn.detach().norm(dim=1, keepdim=True) * 2**0.5  # Q has every angle twice
        ratios: Tensor = limit / lengths_D1.clamp_min(limit)
        return ratios


def size_of_triangle(num_angles: int) -> int:
    """Return b for a triangle of b (b - 1) / 2 numbers. Raises UserError if no triangle has `num_angles` numbers."""
    size = (1 + isqrt(1 + 8 * num_angles)) // 2
    if size < 2 or size * (size - 1) // 2 != num_angles:
        raise UserError(f"{ANGLES} has {num_angles} columns, which is no number of angles of a block")
    return size


def make_fresh(
    layer: nn.Module,
    block_size: int,
    drops: Dropout = NO_DROPOUT,
    has_scalar: bool = False,
    tensors: ModuleTensors | None = None,
    *,
    eps: float | None = None,
    is_shared: bool = False,
    may_adjust: bool = True,
) -> Orthogonal:
    """Make the untrained change of a layer, in the form of a file's `tensors` if they are given."""
    if tensors is not None:
        zeros = torch.zeros(tensors[ANGLES].shape, dtype=torch.float32)
    else:
        num_columns = row_length(layer)
        size = block_size_for(num_columns, block_size, may_adjust)
        zeros = torch.zeros(1 if is_shared else num_columns // size, size * (size - 1) // 2, dtype=torch.float32)
    return Orthogonal(layer, OftV2(zeros, eps), drops, has_scalar)


# --- in files ---


def rank_of(tensors: ModuleTensors) -> int:
    """Return the block size, which takes the place of a rank."""
    return size_of_triangle(tensors[ANGLES].shape[1])


def read(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    refuse_magnitudes(tensors)
    return Orthogonal(layer, OftV2(tensors[ANGLES])).requires_grad_(False)


def fault(name: str, tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why the tensors of a module are not a valid rotation, or None if they are."""
    shape = list(tensors[ANGLES].shape) if ANGLES in tensors else []
    if len(shape) == 2:
        size = (1 + isqrt(1 + 8 * shape[1])) // 2
        if size > 1 and size * (size - 1) // 2 == shape[1]:
            return None
    return f"has {keys[ANGLES]} of the shape {shape}; it needs one row of b * (b - 1) / 2 angles for each block of b"


LAYOUT = KeyLayout(
    name="oft_v2", words="OFT", needs=(ANGLES,), read=read, may_have=(), rank_of=rank_of, fault=fault,
    network_module="networks.oft_v2",
)  # fmt: skip


# --- as a network module ---


@dataclass(frozen=True)
class OftV2Arguments:
    """The network arguments of OFT."""

    block_size: int | None = declare(UNIT, None, aliases=("oft_block_size",), is_fixed_by_file=True)
    """The size of the blocks, before --network_dim; larger ones hold more."""
    coft: bool = declare(SWITCH, False, aliases=("oft_coft",))
    """Limit the angles of each block to coft_eps / sqrt(blocks)."""
    coft_eps: float = declare(NUMBER, 6e-5, needs="coft")
    """The length that all blocks together may have."""
    block_share: bool = declare(SWITCH, False, aliases=("oft_block_share",), is_fixed_by_file=True)
    """All inputs of a layer share one block."""
    enable_conv: bool = declare(SWITCH, False, is_fixed_by_file=True)
    """Adapt convolutions larger than 1x1 too; conv_dim does so with another size."""
    auto_adjust: bool = declare(SWITCH, True, is_fixed_by_file=True)
    """Take the nearest size where one does not divide a layer's inputs."""


def make(request: ChangeRequest) -> Change:
    oft = request.arguments.of(OftV2Arguments)
    return make_fresh(
        request.layer, request.rank, request.drops, request.has_scalar, request.tensors,
        eps=oft.coft_eps if oft.coft else None, is_shared=oft.block_share, may_adjust=oft.auto_adjust,
    )  # fmt: skip


def resolve(settings: NetworkSettings) -> NetworkSettings:
    oft = settings.arguments.of(OftV2Arguments)
    return resolve_blocks(settings, oft.block_size, oft.enable_conv)


def prepare(adapters: Sequence[Adapter], arguments: NetworkArguments) -> StartStep | None:
    """Log the meaning of the settings. With COFT, return the function that limits every rotation before each batch."""
    oft = arguments.of(OftV2Arguments)
    logger.info("OFT: --network_dim is the size of the blocks; --network_alpha does not count")
    if oft.block_share and arguments.of(DropoutArguments).neuron_dropout:
        logger.warning("--network_dropout has no effect with block_share: there is one block, which is never left out")
    return limit if oft.coft else None


def limit(adapters: Sequence[Adapter], seed: int, step: int) -> None:
    """Scale every rotation down to the limit of COFT."""
    for adapter in adapters:
        if isinstance(adapter.change, Orthogonal) and isinstance(adapter.change.rotation, OftV2):
            adapter.change.rotation.limit_(1.0 if adapter.change.scalar is None else adapter.change.scalar)


KIND = AdapterKind(
    (LAYOUT,), make, "networks.oft_v2", DEFAULT_BLOCK_SIZE, OftV2Arguments, resolve=resolve, prepare=prepare,
    refuses={**REFUSED, "dora_wd": "no program that reads OFT applies magnitudes"},
)  # fmt: skip
