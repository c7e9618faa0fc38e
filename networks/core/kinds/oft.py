"""OFT of outputs, as stored by sd-scripts' networks.oft and LyCORIS's diag-oft: outputs are rotated in blocks.

As in sd-scripts, new adapters attach to attention layers only, unless `enable_all_linear` is given. OFT of inputs
(oft_v2.py) costs less.

Letters: O outputs, T all axes but the last, D blocks, b block size.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.base.errors import UserError, about
from library.options.declared import declare
from networks.core.arguments.common import RankArguments
from networks.core.arguments.network_arguments import NetworkArguments, NetworkSettings
from networks.core.arguments.values import SWITCH
from networks.core.changes.alpha import WithAlpha
from networks.core.changes.blocks import REFUSED, refuse_magnitudes, with_kernels
from networks.core.changes.change import Change, ChangeSize, Forward, MergedOnly, Misfit, ModuleTensors, get_weight
from networks.core.changes.dropout import NO_DROPOUT, Dropout
from networks.core.changes.orthogonal import rotation_change
from networks.core.changes.parameter_keys import ALPHA
from networks.core.changes.request import ChangeRequest
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout
from networks.core.targets.targets import Part

logger = logging.getLogger(__name__)

BLOCKS, RESCALE, MATRICES = "oft_blocks", "rescale", "oft_diag"
PIECES = tuple(f"{BLOCKS}.{i}" for i in range(4))  # of the projections of a fused layer


class OrthogonalOutputs(WithAlpha):
    """A rotation of a layer's outputs: W' = R' W with blocks (1 + Q) / (1 - Q) on the diagonal of R.

    `oft_blocks` (D, b, b) holds an unconstrained matrix for each block; Q is that matrix minus its transpose. A fused
    layer has `oft_blocks.0` and so on for consecutive parts of its rows. `alpha` limits the norm of all Q of a part to
    alpha times its number of rows; 0 means no limit, as in LyCORIS. `rescale` (O, 1) or (O, 1, 1, 1) scales the
    outputs. At strength s the weight is W + s (W' - W).
    """

    changed_parameters = ("weight",)
    fast_keys: frozenset[str] = frozenset()
    alpha: Tensor | None
    rescale: nn.Parameter | None

    def __init__(
        self, layer: nn.Module | None, tensors: ModuleTensors, drops: Dropout = NO_DROPOUT, is_trained: bool = True
    ) -> None:
        """`layer` can be None if the change is only merged."""
        super().__init__()
        self.names = tuple(key for key in (BLOCKS, *PIECES) if key in tensors)
        parameters = [nn.Parameter(tensors[name], requires_grad=is_trained) for name in self.names]
        if self.names == (BLOCKS,):
            self.register_parameter(BLOCKS, parameters[0])
        else:
            self.add_module(BLOCKS, nn.ParameterList(parameters))
        scales = tensors.get(RESCALE)
        self.register_parameter(RESCALE, None if scales is None else nn.Parameter(scales, requires_grad=is_trained))
        self.register_buffer(ALPHA, tensors.get(ALPHA))
        self.limit = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
        self.drops = drops
        object.__setattr__(self, "layer", layer)  # not registered: it belongs to the base model
        self.layer: nn.Module | None
        # A training state that is loaded has the limit that its blocks were trained with.
        self.register_load_state_dict_post_hook(lambda change, _: change.read_limit())  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Return the layer's output with the change, in the shape and dtype of the layer's own output."""
        out = base(x)
        if self.training and self.drops.skips_this_call():
            return out
        with torch.autocast(x.device.type, enabled=False):
            residuals = [self._drop(residual) for residual in self._residuals()]
        is_conv = isinstance(self.layer, nn.Conv2d)
        base_out = out.movedim(1, -1) if is_conv else out
        bias = None if self.layer is None else self.layer.bias
        if isinstance(bias, Tensor):
            # R rotates W, not the bias.
            base_out = base_out - bias.to(base_out.dtype)
        change = self._rotate_rows(base_out, residuals)
        return out + (strength * (change.movedim(-1, 1) if is_conv else change)).to(out.dtype)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        residuals = self._residuals()
        num_rows = sum(residual.shape[1] * residual.shape[2] for residual in residuals)
        if num_rows != len(base):
            raise Misfit("", (num_rows, *base.shape[1:]), tuple(base.shape))
        base = base.to(torch.promote_types(base.dtype, residuals[0].dtype))
        change = self._rotate_rows(base.flatten(1).t(), [residual.to(base) for residual in residuals]).t()
        return base + strength * change.reshape(base.shape)

    @property
    def size(self) -> ChangeSize:
        return ChangeSize(block_sizes=tuple(blocks.shape[-1] for blocks in self._blocks()))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Frobenius norm of R - 1, to first order, together with the differences of the scales from 1."""
        # R - 1 is 2 * angles to first order.
        squares = torch.stack([4 * angles.square().sum() for angles in self._angles()]).sum()
        if self.rescale is not None:
            squares = squares + (self.rescale - 1).square().sum()
        return squares.sqrt()

    @torch.no_grad()
    def scale_(self, ratio: Tensor) -> None:
        for blocks in self._blocks():
            blocks.mul_(self._share_within(_skew(blocks)) * ratio.to(blocks))
        if self.rescale is not None:
            self.rescale.sub_(1).mul_(ratio.to(self.rescale)).add_(1)

    def stored_tensors(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a file's tensors, which must have the same form as this change."""
        self.load_state_dict({**self.state_dict(), **tensors})
        self.limit = float(tensors[ALPHA]) if ALPHA in tensors else 0.0

    def read_limit(self) -> None:
        """Copy the loaded alpha to `limit`."""
        if self.alpha is not None and not self.alpha.is_meta:
            self.limit = float(self.alpha)

    def _blocks(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in self.names]

    def _angles(self) -> Iterator[Tensor]:
        """Yield Q within the limit, (D, b, b) for each part, in float32 or wider."""
        for blocks in self._blocks():
            skew = _skew(blocks.to(torch.promote_types(blocks.dtype, torch.float32)))
            yield skew * self._share_within(skew)

    def _share_within(self, skew_Dbb: Tensor) -> Tensor:
        """Return the factor that brings the angles of a part within the limit; 1 if they already are."""
        if self.limit == 0:
            return skew_Dbb.new_ones(())
        length = skew_Dbb.norm()
        limit = self.limit * skew_Dbb.shape[0] * skew_Dbb.shape[1]
        # A factor instead of a condition: the host does not wait for the norm. The limit as a lower bound keeps the
        # division, and with it the gradient, finite.
        share: Tensor = torch.where(length > limit, limit / length.clamp_min(limit), 1.0)
        return share

    def _residuals(self) -> list[Tensor]:
        """Return the blocks of R minus the identity, (1, D, b, b) for each part."""
        residuals = []
        for angles in self._angles():
            identity = torch.eye(angles.shape[-1], dtype=angles.dtype, device=angles.device)
            residuals.append(torch.linalg.solve(identity - angles, 2 * angles)[None])
        return residuals

    def _drop(self, residuals: Tensor) -> Tensor:
        if not self.training or self.drops.neuron == 0:
            return residuals
        keep_FD = torch.rand(residuals.shape[:2], device=residuals.device) > self.drops.neuron
        return residuals * keep_FD[..., None, None].to(residuals.dtype)

    def _rotate_rows(self, rows_TO: Tensor, residuals: Sequence[Tensor]) -> Tensor:
        """Return the change of rows of O numbers, s * (y R) - y with the scales s, part by part."""
        widths = [residual.shape[1] * residual.shape[2] for residual in residuals]
        parts = torch.split(rows_TO, widths, dim=-1)
        change = torch.cat([rotation_change(p, residual) for p, residual in zip(parts, residuals, strict=True)], dim=-1)
        if self.rescale is None:
            return change
        scales_O = self.rescale.flatten().to(change.dtype)
        scaled: Tensor = change * scales_O + rows_TO * (scales_O - 1)
        return scaled


class FixedMatrices(MergedOnly):
    """W' = R' W for `oft_diag` (D, b, b) of LyCORIS before 2.0, which stores the blocks of R, or of R - 1, themselves.

    It is merged, but not trained, since the file has no angles. The blocks are those of R - 1 if the mean of their
    diagonals is at most 0.5.
    """

    words = f"{MATRICES} of LyCORIS"
    oft_diag: Tensor

    def __init__(self, matrices_Dbb: Tensor) -> None:
        super().__init__()
        self.register_buffer(MATRICES, matrices_Dbb)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        blocks = self.oft_diag
        if blocks.shape[0] * blocks.shape[1] != len(base):
            raise Misfit("", (blocks.shape[0] * blocks.shape[1], *base.shape[1:]), tuple(base.shape))
        base = base.to(torch.promote_types(base.dtype, blocks.dtype))
        change = rotation_change(base.flatten(1).t(), self._residual()[None].to(base)).t()
        return base + strength * change.reshape(base.shape)

    def norm(self) -> Tensor:
        norm: Tensor = self._residual().norm()
        return norm

    def scale_(self, ratio: Tensor) -> None:
        raise UserError(f"{MATRICES} of LyCORIS is not trained, so it has no norm to limit")

    def _residual(self) -> Tensor:
        blocks = self.oft_diag
        diagonal = blocks.diagonal(dim1=1, dim2=2).mean()
        identity = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
        return blocks - identity if diagonal > 0.5 else blocks


def _skew(blocks_Dbb: Tensor) -> Tensor:
    return blocks_Dbb - blocks_Dbb.mT


def make_like(layer: nn.Module, tensors: ModuleTensors, drops: Dropout = NO_DROPOUT) -> OrthogonalOutputs:
    """Make the untrained change of a layer in the form of a file."""
    zeros = {key: torch.zeros_like(t, dtype=torch.float32) for key, t in tensors.items() if key != ALPHA}
    zeros |= {key: tensor.float() for key, tensor in tensors.items() if key == ALPHA}
    return OrthogonalOutputs(layer, zeros, drops)


def make_fresh(
    layer: nn.Module, path: str, num_blocks: int, limit: float, drops: Dropout, widths: tuple[int, ...] | None
) -> OrthogonalOutputs:
    """Make a new change that rotates nothing yet, with `num_blocks` blocks for each projection of the layer.

    Raises UserError if `num_blocks` does not divide the outputs or leaves blocks of a single one.
    """
    tensors = {ALPHA: torch.tensor(limit, device="cpu")}  # has a value on the meta device too
    for name, width in zip((BLOCKS,) if widths is None else PIECES, widths or (len(get_weight(layer)),), strict=False):
        if width % num_blocks or width == num_blocks:
            fits = max((number for number in range(1, min(num_blocks, width)) if width % number == 0), default=1)
            raise about("--network_dim")(
                f"{num_blocks} is the number of blocks that outputs are turned in, and {path} has {width} of them",
                f"use a smaller number that divides it, such as {fits}, or --network_module networks.oft_v2",
            )
        tensors[name] = torch.zeros(num_blocks, width // num_blocks, width // num_blocks)
    return OrthogonalOutputs(layer, tensors, drops)


# --- in files ---


def rank_of(tensors: ModuleTensors) -> int:
    """Return the number of blocks, which these programs call the dimension."""
    return next(tensors[key].shape[0] for key in (BLOCKS, *PIECES, MATRICES) if key in tensors)


def read(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    refuse_magnitudes(tensors)
    return OrthogonalOutputs(layer, tensors, is_trained=False)


def read_matrices(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    """Make the change of a module that stores matrices. Raises UserError if it also has scales."""
    if RESCALE in tensors:
        raise UserError(f"{MATRICES} with {RESCALE} is not computed here: what it means differs between versions")
    return FixedMatrices(tensors[MATRICES])


def fault(name: str, tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why the tensors of a module are not a valid rotation, or None if they are."""
    present = [key for key in (BLOCKS, *PIECES, MATRICES) if key in tensors]
    if not present:
        return f"has {keys[RESCALE]} without {BLOCKS}; the file is incomplete"
    pieces = [key for key in PIECES if key in tensors]
    if pieces != list(PIECES[: len(pieces)]):
        return f"has {keys[pieces[-1]]} without all pieces before it; the file is incomplete"
    for key in present:
        shape = list(tensors[key].shape)
        if len(shape) == 4:
            return (
                f"has {keys[key]} of the shape {shape}: BOFT of LyCORIS, which is not computed here; LyCORIS merges it "
                "into a model with lycoris.utils.merge"
            )
        if len(shape) != 3 or shape[1] != shape[2]:
            return f"has {keys[key]} of the shape {shape}; it needs (blocks, b, b)"
    num_rows = sum(tensors[key].shape[0] * tensors[key].shape[1] for key in present)
    if RESCALE in tensors and tensors[RESCALE].numel() != num_rows:
        return f"has {keys[RESCALE]} of the shape {list(tensors[RESCALE].shape)}; it needs one number for each output"
    return None


def _layout(
    needs: tuple[str, ...], optional: tuple[str, ...], network_module: str, reader: Callable[..., Change] = read
) -> KeyLayout:
    return KeyLayout(
        name="oft", words="OFT of outputs", needs=needs, read=reader, may_have=(ALPHA, *optional), rank_of=rank_of,
        alpha_is_strength=False, fault=fault, exact=(RESCALE,), network_module=network_module,
    )  # fmt: skip


LAYOUT = _layout((BLOCKS,), (RESCALE,), "networks.oft")
IN_PIECES = _layout((PIECES[0],), PIECES[1:], "networks.oft")
AS_MATRICES = _layout((MATRICES,), (RESCALE,), "", read_matrices)


# --- as a network module ---


@dataclass(frozen=True)
class OftArguments:
    """The network arguments of OFT of outputs."""

    enable_conv: bool = declare(SWITCH, False, is_fixed_by_file=True)
    """Adapt convolutions larger than 1x1 too; conv_dim does so with another size."""
    enable_all_linear: bool = declare(SWITCH, False, is_fixed_by_file=True)
    """Adapt all layers of the blocks, not those of attention alone."""


def make(request: ChangeRequest) -> Change:
    if request.tensors is not None:
        return make_like(request.layer, request.tensors, request.drops)
    return make_fresh(
        request.layer, request.target.path, request.rank, request.alpha, request.drops, request.qkv_widths
    )


def resolve(settings: NetworkSettings) -> NetworkSettings:
    """Use the rank as the number of blocks, and `network_alpha` as the limit of the angles for all kernels."""
    # The limit is alpha times the number of outputs, which no angles reach at the usual alphas of a LoRA.
    if settings.alpha >= 1:
        logger.warning(
            "--network_alpha %g limits no angle: networks.oft takes it for the limit, where 0.001 or less holds them",
            settings.alpha,
        )
    settings = with_kernels(settings, settings.arguments.of(OftArguments).enable_conv)
    if settings.arguments.of(RankArguments).conv_alpha is not None:
        return settings
    return replace(settings, arguments=settings.arguments.replace(RankArguments, conv_alpha=settings.alpha))


def narrow(part: Part, is_denoiser: bool, arguments: NetworkArguments) -> Part | None:
    """Restrict new adapters to attention, if the base model declares it, unless all layers are requested.

    Text encoders get no adapters.
    """
    if not is_denoiser:
        return None
    adapts_all = arguments.of(OftArguments).enable_all_linear or not part.attention
    return part if adapts_all else replace(part, blocks=part.attention)


KIND = AdapterKind(
    (LAYOUT, IN_PIECES), make, "networks.oft", arguments=OftArguments, merged_layouts=(AS_MATRICES,),
    resolve=resolve, narrow=narrow,
    refuses={
        **REFUSED,
        "use_scalar": "its angles move as they are",
        "dora_wd": "no program that reads OFT applies magnitudes",
    },
)  # fmt: skip
