"""VeRA, an adapter kind for a test: frozen projections from a seed, and two trained vectors per layer.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from library.options.declared import declare
from networks.core.arguments.values import POSITIVE, RANK
from networks.core.changes.additive import read_with, wrap
from networks.core.changes.change import Change, ModuleTensors
from networks.core.changes.low_rank import add_product, run_like
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.changes.request import ChangeRequest
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

B, D, SEED, SHAPE = "vera_lambda_b", "vera_lambda_d", "vera.seed", "vera.shape"


@dataclass(frozen=True)
class VeraArguments:
    """The network arguments of VeRA."""

    projection_seed: int = declare(RANK, 0, "Seed of the projections that all layers share.")
    d_initial: float = declare(POSITIVE, 0.1, "Where the vector between the projections starts.")


@cache
def projection(seed: int, rank: int, size: int) -> Tensor:
    """Return (size, R), Kaiming uniform; smaller layers use the first rows of larger ones."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.rand(size, rank, generator=generator, device="cpu") * 2 - 1) * (3 / rank) ** 0.5


class VeRA(nn.Module):
    """VeRA (Kopiczko et al. 2023, arXiv:2310.11454): dW = diag(b) B diag(d) A.

    A (R, N) and B (O, R) are frozen and not saved: files contain their seed and the shape of the weight. b (O)
    starts at zero, d (R) at `d_initial`.
    """

    has_core = False
    is_whole = False
    fast_key = B

    def __init__(self, layer: nn.Module, rank: int, seed: int = 0, d_initial: float = 0.1) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor)
        self.rank, self.shape = rank, tuple(layer.weight.shape)
        self.layer: nn.Module
        object.__setattr__(self, "layer", layer)
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.shape[0]))
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), d_initial))
        self.vera = nn.Module()
        self.vera.register_buffer("seed", torch.tensor(seed))
        self.vera.register_buffer("shape", torch.tensor(self.shape))
        self._first_seed = seed

    def start_moving(self) -> None:
        nn.init.normal_(self.vera_lambda_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        b, d = self.vera_lambda_b, self.vera_lambda_d
        up_OR = projection(self._seed + 1, self.rank, self.shape[0]).to(b)
        down_NR = projection(self._seed, self.rank, prod(self.shape[1:])).to(d)
        return b[:, None] * up_OR, d[:, None] * down_NR.T

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        return run_like(self.layer, x, self.factors()[1].view(-1, *self.shape[1:]), columns)

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        up_OR = self.factors()[0]
        return add_product(base, hidden, up_OR.view(*up_OR.shape, *(1,) * (len(self.shape) - 2)))

    def weight(self) -> Tensor:
        up_OR, down_RN = self.factors()
        return (up_OR @ down_RN).view(self.shape)

    @property
    def _seed(self) -> int:
        seed = self.vera.get_buffer("seed")
        return self._first_seed if seed.is_meta else int(seed)


def rank_of(tensors: ModuleTensors) -> int:
    return len(tensors[D])


def shape_of(name: str, tensors: ModuleTensors) -> tuple[int, ...]:
    return tuple(tensors[SHAPE].tolist())


def make(request: ChangeRequest) -> Change:
    vera_arguments = request.arguments.of(VeraArguments)
    seed = vera_arguments.projection_seed if request.tensors is None else int(request.tensors[SEED])
    return wrap(request, VeRA(request.layer, request.rank, seed, vera_arguments.d_initial))


LAYOUT = KeyLayout(
    "vera", "VeRA", (B, D, SEED, SHAPE), read_with(VeRA, rank_of, shape_of), rank_of=rank_of, shape_of=shape_of,
    exact=(DORA_SCALE, SEED, SHAPE), switches=(SEED, SHAPE), is_low_rank=True, scaled=B, may_have=(ALPHA, DORA_SCALE),
    network_module="networks.vera",
)  # fmt: skip
KIND = AdapterKind(
    (LAYOUT,), make, "networks.vera", arguments=VeraArguments, refuses={"split_qkv": "all rows share the vector d"}
)
