"""BOFT as in PEFT: layer inputs rotated by a product of sparse orthogonal matrices, and outputs scaled.

Letters: O outputs, N inputs of one output, F factors, D blocks, b block size.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.base.errors import about, error_in
from library.options.declared import declare
from networks.core.arguments.network_arguments import NetworkArguments, NetworkSettings
from networks.core.arguments.values import RANK, SWITCH, UNIT
from networks.core.changes.adapter import Adapter
from networks.core.changes.blocks import REFUSED, block_size_for, refuse_magnitudes, resolve_blocks, row_length
from networks.core.changes.change import Change, ModuleTensors, weight_shape
from networks.core.changes.dropout import NO_DROPOUT, Dropout
from networks.core.changes.orthogonal import Orthogonal
from networks.core.changes.request import ChangeRequest
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

logger = logging.getLogger(__name__)

BLOCKS, SCALES = "boft_R", "boft_s"
DEFAULT_BLOCK_SIZE = 4


class Boft(nn.Module):
    """BOFT (Liu et al. 2024, arXiv:2311.06243): F factors with D blocks (1 - S) / (1 + S) each, and W' = s * (W R').

    `boft_R` (F, D, b, b) starts at zero. S is half of it minus its transpose; it is skew-symmetric, so the blocks are
    exactly orthogonal. Two factors mix 2 b inputs, F factors 2^(F - 1) b. `boft_s` (O, 1) scales the outputs and starts
    at one. Both are float32.
    """

    # bfloat16 would change the rows of the base model by up to 0.4 %.
    exact: tuple[str, ...] = (SCALES,)

    def __init__(self, blocks_FDbb: Tensor, scales_O1: Tensor) -> None:
        super().__init__()
        self.block_size = blocks_FDbb.shape[-1]
        self.boft_R = nn.Parameter(blocks_FDbb)
        self.boft_s = nn.Parameter(scales_O1)

    def angles(self, scalar: Tensor | float) -> Tensor:
        blocks_FDbb = self.boft_R.to(torch.promote_types(self.boft_R.dtype, torch.float32)) * scalar
        return (blocks_FDbb.mT - blocks_FDbb) / 2

    def residuals(self, angles_FDbb: Tensor) -> Tensor:
        identity = torch.eye(self.block_size, dtype=angles_FDbb.dtype, device=angles_FDbb.device)
        # (1 + A) / (1 - A) - 1 with A = -S; both factors commute.
        residuals: Tensor = torch.linalg.solve(identity - angles_FDbb, 2 * angles_FDbb)
        return residuals

    def output_scales(self) -> Tensor:
        return self.boft_s.flatten()

    @torch.no_grad()
    def start_moving(self) -> None:
        nn.init.normal_(self.boft_R, std=1e-2)

    @torch.no_grad()
    def scale_(self, ratio: Tensor, scalar: Tensor | float) -> None:
        self.boft_R.mul_(ratio.to(self.boft_R))
        # Scales change nothing at 1, so only their distance from 1 is scaled.
        self.boft_s.sub_(1).mul_(ratio.to(self.boft_s)).add_(1)

    def in_files(self, scalar: Tensor | float) -> Mapping[str, Tensor]:
        return {BLOCKS: self.boft_R * scalar, SCALES: self.boft_s}


def sizes_for(num_columns: int, wanted: int, num_blocks: int, num_factors: int, may_adjust: bool) -> tuple[int, int]:
    """Return (D, b) of a layer. With several factors b is even and D a multiple of 2^(F - 1).

    `num_blocks` sets D; 0 selects the size `wanted`, or the nearest that fits. Raises UserError if no size fits, or if
    the requested one does not and may not be adjusted.
    """
    if num_factors == 1 and not num_blocks:
        size = block_size_for(num_columns, wanted, may_adjust)
        return num_columns // size, size
    sizes = [size for size in range(2, num_columns + 1) if fits(num_columns, size, num_factors)]
    requested = (
        num_columns // num_blocks if num_blocks and num_columns % num_blocks == 0 else 0 if num_blocks else wanted
    )
    if requested in sizes:
        return num_columns // requested, requested
    setting = f"boft_block_num={num_blocks}" if num_blocks else f"block_size={wanted}"
    if not sizes or num_blocks or not may_adjust:
        raise about("--network_args", cause="does not fit")(
            f"{setting} with boft_n_butterfly_factor={num_factors} does not fit a layer with {num_columns} inputs, of "
            f"which sizes {', '.join(map(str, sizes)) or 'none'} can be made",
            "choose another, or leave the layer out with exclude_patterns",
        )
    size = min(sizes, key=lambda size: (abs(size - wanted), size))
    return num_columns // size, size


def fits(num_columns: int, size: int, num_factors: int) -> bool:
    """Return True if `num_columns` inputs can be divided into blocks of this size."""
    if num_columns % size:
        return False
    # Factors after the first permute half blocks within groups of up to 2^(F - 1) blocks.
    return num_factors == 1 or (size % 2 == 0 and num_columns // size % 2 ** (num_factors - 1) == 0)


def make_fresh(
    layer: nn.Module,
    block_size: int,
    drops: Dropout = NO_DROPOUT,
    has_scalar: bool = False,
    tensors: ModuleTensors | None = None,
    *,
    num_blocks: int = 0,
    num_factors: int = 1,
    may_adjust: bool = True,
) -> Orthogonal:
    """Make the untrained change of a layer, in the form of a file's `tensors` if they are given."""
    if tensors is not None:
        shape = tuple(tensors[BLOCKS].shape)
    else:
        count, size = sizes_for(row_length(layer), block_size, num_blocks, num_factors, may_adjust)
        shape = (num_factors, count, size, size)
    scales = torch.ones(weight_shape(layer)[0], 1, dtype=torch.float32)
    return Orthogonal(layer, Boft(torch.zeros(shape, dtype=torch.float32), scales), drops, has_scalar)


# --- in files ---


def rank_of(tensors: ModuleTensors) -> int:
    """Return the block size, which takes the place of a rank."""
    return tensors[BLOCKS].shape[-1]


def to_own_form(tensors: ModuleTensors) -> dict[str, Tensor]:
    """Return the tensors with the scales as a column (O, 1). PEFT stores a row for convolutions."""
    return {**tensors, SCALES: tensors[SCALES].reshape(-1, 1)}


def read(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    refuse_magnitudes(tensors)
    converted = to_own_form(tensors)
    return Orthogonal(layer, Boft(converted[BLOCKS], converted[SCALES])).requires_grad_(False)


def fault(name: str, tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why the tensors of a module are not a valid rotation, or None if they are."""
    for key, partner in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        if key not in tensors:
            return f"has {keys[partner]} without its {key}; the file is incomplete"
    shape = tuple(tensors[BLOCKS].shape)
    if len(shape) != 4 or shape[2] != shape[3] or not fits(shape[1] * shape[2], shape[2], shape[0]):
        return f"has {keys[BLOCKS]} of the shape {list(shape)}; it needs (factors, blocks, b, b)"
    scales = tuple(tensors[SCALES].shape)
    if max(scales, default=1) != tensors[SCALES].numel():
        return f"has {keys[SCALES]} of the shape {list(scales)}; it needs one number for each output"
    return None


LAYOUT = KeyLayout(
    name="boft", words="BOFT", needs=(BLOCKS, SCALES), read=read, may_have=(), rank_of=rank_of, fault=fault,
    exact=(SCALES,), own_form=to_own_form, network_module="networks.boft",
)  # fmt: skip


# --- as a network module ---


@dataclass(frozen=True)
class BoftArguments:
    """The network arguments of BOFT."""

    block_size: int | None = declare(UNIT, None, aliases=("boft_block_size",), is_fixed_by_file=True)
    """The size of the blocks, before --network_dim; larger ones hold more."""
    block_num: int = declare(RANK, 0, aliases=("boft_block_num",), is_fixed_by_file=True)
    """How many blocks, in place of their size."""
    boft_n_butterfly_factor: int = declare(UNIT, 1, is_fixed_by_file=True)
    """How many factors rotate one after the other."""
    enable_conv: bool = declare(SWITCH, False, is_fixed_by_file=True)
    """Adapt convolutions larger than 1x1 too; conv_dim does so with another size."""
    auto_adjust: bool = declare(SWITCH, True, is_fixed_by_file=True)
    """Take the nearest size where one does not divide a layer's inputs."""


def make(request: ChangeRequest) -> Change:
    boft = request.arguments.of(BoftArguments)
    return make_fresh(
        request.layer, request.rank, request.drops, request.has_scalar, request.tensors,
        num_blocks=boft.block_num, num_factors=boft.boft_n_butterfly_factor, may_adjust=boft.auto_adjust,
    )  # fmt: skip


def resolve(settings: NetworkSettings) -> NetworkSettings:
    """Use the block size as the rank. Raises UserError if both a size and a number of blocks are given."""
    boft = settings.arguments.of(BoftArguments)
    if boft.block_size and boft.block_num:
        raise error_in("--network_args block_size")(
            f"--network_args block_size={boft.block_size} and boft_block_num={boft.block_num} say the same in two ways",
            "give one of them",
        )
    return resolve_blocks(settings, boft.block_size, boft.enable_conv)


def prepare(adapters: Sequence[Adapter], arguments: NetworkArguments) -> None:
    """Log the meaning of the settings for this kind."""
    if arguments.of(BoftArguments).block_num:
        logger.info("BOFT: boft_block_num gives the sizes of blocks; --network_dim and --network_alpha do not count")
    else:
        logger.info("BOFT: --network_dim is the size of the blocks; --network_alpha does not count")


KIND = AdapterKind(
    (LAYOUT,), make, "networks.boft", DEFAULT_BLOCK_SIZE, BoftArguments, resolve=resolve, prepare=prepare,
    refuses={**REFUSED, "dora_wd": "boft_s already trains the lengths of the weight's rows"},
)  # fmt: skip
