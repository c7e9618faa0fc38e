"""LoRA: the change of a weight as the product of two small factors, optionally with a Tucker core between them.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from library.base.errors import error_in
from library.checkpoints.adapter_names import NAMINGS
from networks.core.changes.additive import read_with, wrap
from networks.core.changes.change import Change, Delta, MakeDelta, ModuleTensors
from networks.core.changes.ggpo import GgpoArguments
from networks.core.changes.init import FromStart, InitArguments, make_starting_delta
from networks.core.changes.low_rank import LowRank
from networks.core.changes.parameter_keys import ALPHA, DOWN, UP
from networks.core.changes.qkv_split import SplitRank, are_apart
from networks.core.changes.request import ChangeRequest
from networks.core.changes.tlora import TLoraArguments
from networks.core.changes.tucker import MID, Tucker
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

MakeSplit = Callable[[nn.Linear, int, tuple[int, ...]], Delta]
"""(fused layer, rank of each projection, outputs of each projection) -> a new delta for the layer's weight."""


def make(request: ChangeRequest) -> Change:
    return make_pair(request, LowRank, SplitRank)


def make_pair(request: ChangeRequest, make_delta: MakeDelta, make_split: MakeSplit) -> Change:
    """Make the change of one layer with `make_delta`, or with another delta for split_qkv, `init` or a Tucker core.

    Raises UserError if a file does not have the form that these arguments require.
    """
    layer, rank, alpha = request.layer, request.rank, request.alpha
    init = request.arguments.of(InitArguments)
    if (widths := request.split_widths) is not None:
        if request.tensors is not None:
            check_apart(request, widths)
            # Files hold one LoRA of N times the rank and alpha of each projection.
            rank, alpha = rank // len(widths), alpha / len(widths)
        assert isinstance(layer, nn.Linear)
        return wrap(request, make_split(layer, rank, widths), alpha)
    if init.starts_at_weight and request.tensors is not None:  # the file has the initial values
        if rank % 2:
            raise error_in("--network_args init")(
                f"--network_args init={init.init}: {request.target.name} has rank {rank} in {request.source}, but "
                "files trained with it have even ranks",
                "leave init out to train it further as it is",
            )
        # Files have twice the rank and alpha of the settings.
        return wrap(request, FromStart(layer, rank // 2), alpha / 2)
    if init.init is not None and request.tensors is None:
        return wrap(request, make_starting_delta(init.init, layer, rank, (alpha or rank) / rank))
    return wrap(request, Tucker(layer, rank) if request.has_core else make_delta(layer, rank))


def check_apart(request: ChangeRequest, widths: tuple[int, ...]) -> None:
    """Raise UserError if a file has one adapter for all projections of a layer."""
    assert request.tensors is not None
    if not are_apart(request.tensors, widths):
        raise error_in("--network_args split_qkv")(
            f"--network_args split_qkv: {request.target.name} is one adapter for all projections of its layer in "
            f"{request.source}",
            "leave split_qkv out to train it further as it is",
        )


# --- in files ---


def make_tensors(
    up_OR: Tensor, down_RN: Tensor, shape: tuple[int, ...], alpha: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA for a weight of `shape`, (O, I) or (O, I, h, w), from factors that are matrices."""
    rank = down_RN.shape[0]
    tensors = {
        DOWN: down_RN.reshape(rank, *shape[1:]).contiguous(),
        UP: up_OR.reshape(shape[0], rank, *(1,) * (len(shape) - 2)).contiguous(),
    }
    return tensors if alpha is None else {**tensors, ALPHA: alpha}


def rank_of(tensors: ModuleTensors) -> int:
    """Return R, the number of columns of lora_up."""
    return tensors[UP].shape[1]


def shape_of(name: str, tensors: ModuleTensors) -> tuple[int, ...]:
    """Return the shape of the weight: (O, I), or (O, I, h, w) for a convolution, whose kernel a core has."""
    return (tensors[UP].shape[0], tensors[DOWN].shape[1], *tensors.get(MID, tensors[DOWN]).shape[2:])


def fault(name: str, tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why the tensors of a module do not fit together, or None if they do."""
    if (DOWN in tensors) != (UP in tensors):
        present, missing = (keys[DOWN], "up") if DOWN in tensors else (keys[UP], "down")
        return f"has {present} without its {missing} factor; the file is incomplete"
    if DOWN not in tensors:
        return None
    up, down, mid = tensors[UP], tensors[DOWN], tensors.get(MID)
    if up.dim() not in (2, 4) or down.dim() not in (2, 4) or up.dim() > down.dim():  # LyCORIS's DyLoRA has 2 and 4
        return (
            f": the factors of {name} have the shapes {list(up.shape)} and {list(down.shape)}; both "
            "must have 2 dimensions, or 4 for a convolution"
        )
    ranks = up.shape[1], down.shape[0]
    if ranks[0] == ranks[1] if mid is None else ranks == tuple(mid.shape[:2]):
        return None
    core = "" if mid is None else f", mid is {list(mid.shape)}"
    return f": the factors of {name} do not fit together: up is {list(up.shape)}, down is {list(down.shape)}{core}"


LAYOUT = KeyLayout(
    name="low_rank",
    words="LoRA",
    needs=(DOWN, UP),
    read=read_with(LowRank, rank_of, shape_of),
    rank_of=rank_of,
    shape_of=shape_of,
    is_low_rank=True,
    ends=(DOWN, UP),
    scaled=UP,
    namings=frozenset(NAMINGS),
    together="lora_down and lora_up",
    fault=fault,
    network_module="networks.lora",
)
TUCKER = replace(
    LAYOUT,
    name="tucker",
    words="LoRA with a Tucker core",
    needs=(DOWN, MID, UP),
    read=read_with(Tucker, rank_of, shape_of),
    core=(MID,),
    namings=frozenset(("kohya",)),
)
KIND = AdapterKind((LAYOUT, TUCKER), make, "networks.lora", wrappers=(GgpoArguments, TLoraArguments, InitArguments))
