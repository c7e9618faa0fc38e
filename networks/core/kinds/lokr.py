"""LoKr: the change of a weight as the Kronecker product of two matrices, each of which can be a product of factors.

Letters: O = L * K outputs, I = M * N inputs (features or channels), R rank, h w kernel.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod, sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from library.options.declared import declare
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.arguments.values import FACTOR, SWITCH
from networks.core.changes.adapter import Adapter
from networks.core.changes.additive import read_delta, wrap
from networks.core.changes.change import Change, Delta, ModuleTensors, check_kernel, get_weight, match_dtype, stand_in
from networks.core.changes.dora import scale_columns
from networks.core.changes.qkv_pieces import changes_in
from networks.core.changes.request import ChangeRequest
from networks.core.kinds.loha import IS_3X3
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

logger = logging.getLogger(__name__)

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B = "lokr_w2", "lokr_w2_a", "lokr_w2_b"
CORE = "lokr_t2"
SIDES = ((W1, W1_A, W1_B), (W2, W2_A, W2_B))


class LoKr(nn.Module):
    """LoKr (Yeh et al. 2023, arXiv:2309.14859): dW = w1 (x) w2, that is dW[l K + k, m N + n] = w1[l, m] w2[k, n].

    `lokr_w1` is (L, M), `lokr_w2` (K, N) or (K, N, h, w). Either can be a product of `_a` and `_b` of rank R: w1 of (L,
    R) and (R, M), w2 of (K, R) and (R, N * h * w), or with the core `lokr_t2` (R, R, h, w) of (R, K) and (R, N). All
    are float32 and kaiming uniform with a = sqrt(5), except w2 or w2_b, which starts at zero. Names, shapes and initial
    values are those of LyCORIS.

    A layer runs w1 and w2 one after the other, on M groups of N inputs, so dW is never built. If neither is a product
    there is no rank: alpha has no effect, and dropout acts on outputs.
    """

    def __init__(
        self, layer: nn.Module, rank: int, outer: tuple[int, int], is_product: tuple[bool, bool], has_core: bool = False
    ) -> None:
        """`outer` is (L, M). `is_product` holds for w1 and w2 True if the matrix is a product of factors."""
        super().__init__()
        self.layer: nn.Module
        object.__setattr__(self, "layer", check_kernel(layer))  # not registered: it belongs to the base model
        self.shape = tuple(get_weight(layer).shape)
        self.is_product, self.has_core = is_product, has_core
        self.is_whole = not any(is_product)
        self.rank = 1 if self.is_whole else rank
        self.fast_key = W1_A if is_product[0] else W1
        kernel = self.shape[2:]
        self.outer = outer
        self.inner = self.shape[0] // outer[0], self.shape[1] // outer[1]
        (num_l, num_m), (num_k, num_n) = self.outer, self.inner
        shapes: dict[str, tuple[int, ...]] = {}
        if has_core:
            shapes |= {CORE: (rank, rank, *kernel), W2_A: (rank, num_k), W2_B: (rank, num_n)}
        elif is_product[1]:
            shapes |= {W2_A: (num_k, rank), W2_B: (rank, num_n * prod(kernel))}
        else:
            shapes |= {W2: (num_k, num_n, *kernel)}
        shapes |= {W1_A: (num_l, rank), W1_B: (rank, num_m)} if is_product[0] else {W1: self.outer}
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
            self.register_parameter(name, parameter)
            if name not in (W2, W2_B):
                nn.init.kaiming_uniform_(parameter, a=sqrt(5))

    def start_moving(self) -> None:
        nn.init.kaiming_uniform_(self.get_parameter(W2_B if self.is_product[1] else W2), a=sqrt(5))

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the channels with an additional axis of groups: (..., groups, R), or (B, R, groups, h, w).

        If both matrices are whole there are no channels, and the outputs are returned.
        """
        x = match_dtype(self.get_parameter(self.fast_key), x)
        if columns is not None:
            # Neither matrix has a number for each input of the layer, so the input is scaled.
            x = scale_columns(x, columns)
        groups = _unflatten(x, 1 if self._is_conv else x.dim() - 1, self.outer[1], self.inner[1])
        if self.is_whole:
            return self._join_groups(self._mix(self._w1(), self._within(self.get_parameter(W2), groups)))
        if not self.is_product[1]:
            mixed = self._mix(self.get_parameter(W1_B), groups)
            return mixed if self._is_conv else mixed.transpose(-1, -2)
        if self.has_core:
            groups = self._within(self._pointwise(W2_B), groups, is_pointwise=True)
            hidden = self._within(self.get_parameter(CORE), groups)
        else:
            w2_b = self.get_parameter(W2_B)
            hidden = self._within(w2_b.view(len(w2_b), self.inner[1], *self.shape[2:]), groups)
        return hidden.transpose(1, 2) if self._is_conv else hidden

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        if self.is_whole:
            return base + hidden.to(base.dtype)
        if self.is_product[1]:
            groups = self._mix(self._w1(), hidden.transpose(1, 2) if self._is_conv else hidden)
            changed = self._within(self._pointwise(W2_A), groups, is_pointwise=True)
        else:
            groups = self._mix(self.get_parameter(W1_A), hidden if self._is_conv else hidden.transpose(-1, -2))
            changed = self._within(self.get_parameter(W2), groups)
        return base + self._join_groups(changed).to(base.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (w1_a (x) w2_a, w1_b (x) w2_b). A whole matrix is the product of itself and an identity."""
        (a1, b1), (a2, b2) = self._pair(0), self._pair(1)
        return _kron(a1, a2), _kron(b1, b2)

    def weight(self) -> Tensor:
        return _kron(self._w1(), self._w2()).view(self.shape)

    @property
    def _is_conv(self) -> bool:
        return len(self.shape) == 4

    def _w1(self) -> Tensor:
        """Return w1, (L, M)."""
        return self.get_parameter(W1_A) @ self.get_parameter(W1_B) if self.is_product[0] else self.get_parameter(W1)

    def _w2(self) -> Tensor:
        """Return w2, (K, N * h * w)."""
        if not self.is_product[1]:
            return self.get_parameter(W2).flatten(1)
        a, b = self._pair(1)
        return a @ b

    def _pair(self, side: int) -> tuple[Tensor, Tensor]:
        """Return the two factors of w1 (L, M) for side 0, or of w2 (K, N * h * w) for side 1."""
        matrix_key, left_key, right_key = SIDES[side]
        if self.is_product[side]:
            a: Tensor = self.get_parameter(left_key)
            b: Tensor = self.get_parameter(right_key)
            if side == 1 and self.has_core:
                a, b = a.t(), torch.einsum("pqhw,qn->pnhw", self.get_parameter(CORE), b).flatten(1)
            return a, b
        matrix = self.get_parameter(matrix_key).flatten(1)
        identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
        return (identity, matrix) if matrix.shape[0] < matrix.shape[1] else (matrix, identity)

    def _pointwise(self, name: str) -> Tensor:
        """Return w2_a (K, R) or, with a core, w2_b (R, N), as a matrix or a 1x1 kernel."""
        weight = self.get_parameter(name).t() if self.has_core and name == W2_A else self.get_parameter(name)
        return weight[..., None, None] if self._is_conv else weight

    def _mix(self, matrix: Tensor, groups: Tensor) -> Tensor:
        """Multiply a matrix onto the group axis of (..., groups, channels) or (B, groups, channels, h, w)."""
        if not self._is_conv:
            return matrix @ groups
        return _unflatten(matrix @ groups.flatten(2), 2, *groups.shape[2:])

    def _within(self, weight: Tensor, groups: Tensor, is_pointwise: bool = False) -> Tensor:
        """Run every group through the same weight, with the layer's kernel geometry unless `is_pointwise`."""
        if not isinstance(self.layer, nn.Conv2d):
            return linear(groups, weight)
        num_samples, num_groups = groups.shape[:2]
        # Groups become samples, so that one convolution serves all of them.
        images = groups.flatten(0, 1)
        layer = self.layer
        if is_pointwise:
            images = conv2d(images, weight)
        else:
            images = conv2d(images, weight, None, layer.stride, layer.padding, layer.dilation)
        return _unflatten(images, 0, num_samples, num_groups)

    def _join_groups(self, groups: Tensor) -> Tensor:
        return groups.flatten(1, 2) if self._is_conv else groups.flatten(-2)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """Return the Kronecker product of two matrices. torch.kron rejects some transposed ones."""
    product = first[:, None, :, None] * second[None, :, None]
    return product.reshape(len(first) * len(second), -1)


def _unflatten(x: Tensor, axis: int, *sizes: int) -> Tensor:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def factorize(size: int, factor: int) -> tuple[int, int]:
    """Return two integers with the product `size`, the smaller first. One is `factor` if that divides `size`.

    Otherwise the smaller is as large as possible, but not above `factor` unless that is -1.
    """
    if factor > 0 and size % factor == 0:
        small = min(factor, size // factor)
    else:
        largest = isqrt(size) if factor < 0 else min(isqrt(size), factor)
        small = next(n for n in range(largest, 0, -1) if size % n == 0)
    return small, size // small


def make_fresh(
    layer: nn.Module, rank: int, factor: int = -1, is_both: bool = False, is_full: bool = False, has_core: bool = False
) -> Delta:
    """Make a LoKr as requested by the arguments `factor`, `decompose_both` and `full_matrix`.

    A matrix with a longer side of at most twice the rank stays whole, since factors would have no fewer numbers.
    """
    (num_l, num_k), (num_m, num_n) = (factorize(size, factor) for size in get_weight(layer).shape[:2])
    is_product = (
        is_both and not is_full and 2 * rank < max(num_l, num_m),
        not is_full and 2 * rank < max(num_k, num_n),
    )
    return LoKr(layer, rank, (num_l, num_m), is_product, has_core and is_product[1])


# --- in files ---


def outer_shape(tensors: ModuleTensors) -> tuple[int, int]:
    """Return (L, M)."""
    if W1 in tensors:
        return tensors[W1].shape[0], tensors[W1].shape[1]
    return tensors[W1_A].shape[0], tensors[W1_B].shape[1]


def shape_of(name: str, tensors: ModuleTensors) -> tuple[int, ...]:
    """Return the shape of the weight; (O, I * h * w) if nothing shows that it is a convolution."""
    num_l, num_m = outer_shape(tensors)
    inner: tuple[int, ...]
    kernel: tuple[int, ...]
    if W2 in tensors:
        inner, kernel = tuple(tensors[W2].shape[:2]), tuple(tensors[W2].shape[2:])
    elif CORE in tensors:
        inner, kernel = (tensors[W2_A].shape[1], tensors[W2_B].shape[1]), tuple(tensors[CORE].shape[2:])
    else:
        inner, kernel = (tensors[W2_A].shape[0], tensors[W2_B].shape[1]), ()
        if inner[1] % 9 == 0 and IS_3X3.fullmatch(name) is not None:
            inner, kernel = (inner[0], inner[1] // 9), (3, 3)
    return (num_l * inner[0], num_m * inner[1], *kernel)


def rank_of(tensors: ModuleTensors) -> int:
    """Return R; 1 for two whole matrices."""
    return next((tensors[key].shape[0] for key in (W2_B, W1_B) if key in tensors), 1)


def make_like(layer: nn.Module, tensors: ModuleTensors) -> Delta:
    """Make a LoKr in the form of a module in a file, which follows from the shapes of its tensors."""
    return LoKr(layer, rank_of(tensors), outer_shape(tensors), (W1 not in tensors, W2 not in tensors), CORE in tensors)


def read(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    with torch.device("meta"):
        delta = make_like(layer or stand_in(shape_of("", tensors)), tensors)
    return read_delta(delta, tensors, layer)


def fault(name: str, tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why the tensors of a module do not fit together, or None if they do."""
    known = {*SIDES[0], *SIDES[1], CORE}
    for key in tensors:
        if key.startswith("lokr_") and key not in known:
            return f"has {keys[key]}, which no known LoKr has"
    if (reason := _fault_of_side(SIDES[0], tensors, keys) or _fault_of_side(SIDES[1], tensors, keys)) is not None:
        return reason
    if CORE in tensors and W2 in tensors:
        return f"has {keys[CORE]} beside {keys[W2]}, which needs no core"
    dimensions = {W2: (2, 4), CORE: (4,)}
    sizes = {key: dimensions.get(key, (2,)) for key in tensors if key in known}
    if any(tensors[key].dim() not in allowed for key, allowed in sizes.items()) or _are_apart(tensors):
        shapes = ", ".join(f"{key} is {list(tensors[key].shape)}" for key in sizes)
        return f": the factors of {name} do not fit together: {shapes}"
    return None


def _fault_of_side(side: tuple[str, str, str], tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why one of the two matrices is not there in exactly one form: whole, or as two factors."""
    matrix_key, left_key, right_key = side
    factors = [key for key in (left_key, right_key) if key in tensors]
    if matrix_key in tensors:
        return f"has {keys[matrix_key]} and {keys[factors[0]]}, two forms of the same matrix" if factors else None
    if len(factors) == 1:
        missing = right_key if factors[0] == left_key else left_key
        return f"has {keys[factors[0]]} without its {missing}; the file is incomplete"
    if not factors:
        other = next(key for key in tensors if key.startswith("lokr_"))
        return f"has {keys[other]} without {matrix_key}, or {left_key} and {right_key}; the file is incomplete"
    return None


def _are_apart(tensors: ModuleTensors) -> bool:
    """Return True if the inner sizes of factors differ."""
    ranks = [tensors[key].shape[1 if key in (W1_A, W2_A) and not (key == W2_A and CORE in tensors) else 0]
             for key in (W1_A, W1_B, W2_A, W2_B) if key in tensors]  # fmt: skip
    ranks += list(tensors[CORE].shape[:2]) if CORE in tensors else []
    return len(set(ranks)) > 1


def _layouts() -> Iterator[KeyLayout]:
    """Yield a layout for each complete set of parameter keys."""
    for first in (SIDES[0][:1], SIDES[0][1:]):
        for second in (SIDES[1][:1], SIDES[1][1:]):
            is_whole = len(first) == len(second) == 1
            yield KeyLayout(
                name="lokr", words="LoKr", needs=(*first, *second), read=read,
                core=(CORE,) if len(second) == 2 else (), rank_of=rank_of, shape_of=shape_of, is_low_rank=True,
                scaled=first[0], namings=frozenset(("kohya", "generic")), fault=fault, network_module="networks.lokr",
                is_whole=is_whole,
            )  # fmt: skip


# --- as a network module ---


@dataclass(frozen=True)
class LokrArguments:
    """The network arguments of LoKr."""

    factor: int | None = declare(FACTOR, None, is_fixed_by_file=True)
    """A side of the small matrix, where it divides both sides; -1, as if unset, for the nearest to a square."""
    decompose_both: bool = declare(SWITCH, False, is_fixed_by_file=True)
    """Make the small matrix a product too, where it is large enough."""
    full_matrix: bool = declare(SWITCH, False, is_fixed_by_file=True)
    """Make neither matrix a product."""


def make(request: ChangeRequest) -> Change:
    if request.tensors is not None:
        return wrap(request, make_like(request.layer, request.tensors))
    lokr = request.arguments.of(LokrArguments)
    factor = -1 if lokr.factor is None else lokr.factor
    delta = make_fresh(
        request.layer, request.rank, factor, lokr.decompose_both, lokr.full_matrix, has_core=request.has_core
    )
    return wrap(request, delta)


def prepare(adapters: Sequence[Adapter], arguments: NetworkArguments) -> None:
    """Log how many modules have no rank. Warn about decompose_both, if full_matrix overrides it."""
    lokr = arguments.of(LokrArguments)
    if lokr.decompose_both and lokr.full_matrix:
        logger.warning("--network_args decompose_both has no effect with full_matrix, which keeps both matrices whole")
    sizes = [change.size for adapter in adapters for change in changes_in(adapter.change)]
    sizes = [size for size in sizes if size.has_ranks]
    num_whole = sum(size.is_whole for size in sizes)
    if num_whole:
        logger.info(
            "LoKr: %d of %d modules are two whole matrices; --network_dim and --network_alpha say nothing about them",
            num_whole,
            len(sizes),
        )


KIND = AdapterKind(
    tuple(_layouts()), make, "networks.lokr", arguments=LokrArguments, prepare=prepare,
    refuses={"split_qkv": "all rows of a layer share its two matrices"},
)  # fmt: skip
