"""Initial values of LoRA factors (network argument `init`), with which the file remains a plain LoRA of the base model.

PiSSA and OLoRA start from a part of the layer's weight and train it in its place. Other programs apply the file to the
unmodified base model, so this part stays in the base weight, and the change is the trained product minus the initial
one.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w, K = min(O, N).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from library.base.errors import UserError, error_in
from library.options.declared import declare
from library.options.kinds import Kind
from networks.core.changes.change import Delta, get_weight
from networks.core.changes.low_rank import LowRank, TwoFactors
from networks.core.changes.parameter_keys import ALPHA, DOWN, START, UP
from networks.core.changes.svd import OVERSAMPLED

START_DOWN, START_UP = f"lora_down{START}", f"lora_up{START}"
DAMPING = 10.0  # divisor of PEFT's orthogonal factors
ORTHOGONAL, PISSA, OLORA = "orthogonal", "pissa", "olora"
INITS = ("default", PISSA, f"{PISSA}_niter_4", OLORA, ORTHOGONAL)
PISSA_WITH_ITERATIONS = re.compile(rf"{PISSA}_niter_(\d{{1,3}})")


INIT = Kind(
    f"one of {', '.join(INITS)} (any number of power iterations)",
    lambda name: name in INITS or PISSA_WITH_ITERATIONS.fullmatch(name) is not None,
    lambda name: None if name == "default" else name,
    parse=lambda text: text.strip().lower(),
)


@dataclass(frozen=True)
class InitArguments:
    """Initial values of the factors of a LoRA. By default up starts at zero and down at random."""

    init: str | None = declare(
        INIT,
        None,
        f"How the factors start: one of {', '.join(INITS)}; pissa and olora for short trainings, at a lower rate.",
    )

    switches: ClassVar[tuple[str, ...]] = ("init",)
    made_for: ClassVar[str] = "it says where the two factors of a LoRA start, and both of them train"
    excludes: ClassVar[Mapping[str, str]] = {
        "use_tucker": "it is made for two factors, not three",
        "use_scalar": "a trained strength starts at zero, and where the change starts at zero too neither has a "
        "gradient",
        "split_qkv": "it is made for the weight of a layer as a whole",
    }

    @property
    def is_on(self) -> bool:
        return self.init is not None

    @property
    def label(self) -> str:
        return f"init={self.init}"

    @property
    def starts_at_weight(self) -> bool:
        """True if factors start from the base weight. Files then have twice the rank."""
        return self.init not in (None, ORTHOGONAL)


class FromStart(TwoFactors):
    """Two factors that start from the base weight: dW = (up0 + up) @ (down0 + down) - up0 @ down0.

    The parameters `up` and `down` start at zero and hold the movement of the factors. The change then starts at exactly
    zero in every precision, no large numbers are subtracted, and weight decay pulls towards the base model. It is
    computed and saved as a LoRA of rank 2 R: dW = [up, up0] @ [down0 + down; down]. Alpha is twice as large in files,
    so that alpha / rank is the trained scale.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        """Start from up0 = down0 = 0, to be set by `begin_at` or from a file."""
        super().__init__()
        self.rank = rank
        lora = LowRank(layer, rank)
        self.lora_down, self.lora_up = lora.lora_down, lora.lora_up
        for module in (self.lora_down, self.lora_up):
            nn.init.zeros_(get_weight(module))
            module.register_buffer("start", torch.zeros_like(get_weight(module)).detach())

    @torch.no_grad()
    def begin_at(self, up_OR: Tensor, down_RN: Tensor) -> None:
        """Set up0 and down0. Ranks beyond those given start like a plain LoRA: up at zero, down at random."""
        up, down = _start(self.lora_up), _start(self.lora_down)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        up.flatten(1)[:, : up_OR.shape[1]] = up_OR.to(up)
        down.flatten(1)[: down_RN.shape[0]] = down_RN.to(down)

    def start_moving(self) -> None:
        raise AssertionError("use_scalar is refused where factors start at a part of the weight")

    def down_factor(self) -> Tensor:
        moved = get_weight(self.lora_down)
        return torch.cat([_start(self.lora_down) + moved, moved])

    def up_factor(self) -> Tensor:
        return torch.cat([get_weight(self.lora_up), _start(self.lora_up)], 1)

    def as_one(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors in memory as the LoRA of twice the rank that is stored in files."""
        up, down = tensors[UP], tensors[DOWN]
        return {
            DOWN: torch.cat([tensors[START_DOWN] + down, down]),
            UP: torch.cat([up, tensors[START_UP]], 1),
            **{key: t for key, t in tensors.items() if key not in (DOWN, UP, START_DOWN, START_UP)},
            # The rank in files is twice as large, and alpha / rank must stay the trained scale.
            ALPHA: tensors[ALPHA] * 2,
        }

    def apart(self, tensors: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
        """Return a file's tensors as they are in memory, in float32. Raises UserError for a rank other than 2 R."""
        rank = tensors[DOWN].shape[0]
        if rank != 2 * self.rank:
            raise UserError(
                f"{name} has rank {rank} in {source}, but with --network_args init it has {2 * self.rank} in files, "
                "twice the rank of the settings. Leave init out to train a plain LoRA further (its own weights are the "
                "start), or set --network_dim to half the rank if it was trained with the same init"
            )
        moved_down, down = tensors[DOWN].float().chunk(2)
        up, start = tensors[UP].float().chunk(2, 1)
        alpha = float(tensors[ALPHA]) if ALPHA in tensors else float(rank)
        return {
            **tensors,
            DOWN: down, UP: up, START_DOWN: moved_down - down, START_UP: start,
            ALPHA: torch.tensor(alpha / 2, dtype=torch.float32),
        }  # fmt: skip


def _start(module: nn.Module) -> Tensor:
    start = module.start
    assert isinstance(start, Tensor)
    return start


def make_starting_delta(init: str, layer: nn.Module, rank: int, scale: float) -> Delta:
    """Make the delta of a layer with the initialisation `init`; `scale` is alpha / rank.

    PiSSA divides its start by `scale`. The decomposed weight is the one that the layer computes with, decoded if the
    base is stored in 4 or 8 bits. Raises UserError for a rank that the initialisation does not support.
    """
    if init == ORTHOGONAL:
        return orthogonal(layer, rank)
    delta = FromStart(layer, rank)
    # A network on the meta device, made to check a run before models are loaded, has no weight to decompose.
    if not (weight := get_weight(layer)).is_meta:
        # torch's decompositions do not support 16 bits.
        weight_ON = weight.detach().flatten(1).float()
        delta.begin_at(*(olora(weight_ON, rank) if init == OLORA else pissa(init, weight_ON, rank, scale)))
    return cast(Delta, delta)


def pissa(init: str, weight_ON: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return (up_OR, down_RN) of PiSSA (arXiv:2404.02948).

    `scale` times their product is the best rank-R approximation of the weight. Both factors have the same norm. With
    `pissa_niter_4` the singular vectors come from random projections and 4 power iterations, at a fraction of the cost
    for large layers.
    """
    if (match := PISSA_WITH_ITERATIONS.fullmatch(init)) is not None:
        num_vectors = min(rank + OVERSAMPLED, *weight_ON.shape)
        u_OK, s_K, v_NK = torch.svd_lowrank(weight_ON, num_vectors, niter=int(match[1]))
        v_KN = v_NK.T
    else:
        u_OK, s_K, v_KN = torch.linalg.svd(weight_ON, full_matrices=False)
    u_OR, s_R, v_RN = u_OK[:, :rank], s_K[:rank], v_KN[:rank]
    root_R = (s_R / scale).sqrt()
    return u_OR * root_R, root_R[:, None] * v_RN


def olora(weight_ON: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (up_OR, down_RN) of OLoRA (arXiv:2406.01775): the first columns of Q and rows of R, with weight = Q R."""
    q_OK, r_KN = torch.linalg.qr(weight_ON)
    return q_OK[:, :rank], r_KN[:rank]


@torch.no_grad()
def orthogonal(layer: nn.Module, rank: int) -> Delta:
    """Make a LoRA whose factors are random and orthogonal to each other, so that their product starts at zero.

    As in PEFT, down is made from half the rows of an orthogonal matrix and up from the other half. The product is zero
    up to rounding, so nothing is subtracted. Raises UserError for an odd rank.
    """
    if rank % 2:
        raise error_in("--network_args init")(
            f"--network_args init={ORTHOGONAL} needs even ranks, half for each factor, but a module has rank {rank}",
            f"set --network_dim (or the rank that this module has of --network_args) to {rank + 1}",
        )
    delta = LowRank(layer, rank)
    down, up = get_weight(delta.lora_down), get_weight(delta.lora_up)
    if not down.is_meta:
        q_RR, _ = torch.linalg.qr(torch.randn(rank, rank))
        down_NR = torch.randn(down[0].numel(), rank // 2) @ q_RR[0::2] / DAMPING
        # Even and odd rows of an orthogonal matrix are orthogonal to each other, so up @ down is zero.
        up_OR = torch.randn(rank // 2, len(up)).T @ q_RR[1::2] / DAMPING
        down.copy_(down_NR.T.reshape(down.shape))
        up.copy_(up_OR.reshape(up.shape))
    return delta
