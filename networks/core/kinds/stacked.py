"""Several low-rank changes of one Linear at once, each on rows of its own: a sweep's adapters in one product.

Letters: M changes, N rows of each (samples times positions), O output features, I input features, R the largest rank.
"""

from collections.abc import Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from networks.core.kinds.change import Forward, in_dtype_of
from networks.core.kinds.joins import scale_columns
from networks.core.kinds.scaled import ScaledDelta


@runtime_checkable
class Paired(Protocol):
    """A delta that is the product of two factors, and multiplies by nothing else."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """(down, up) as the next call multiplies them: (R, I) and (O, R), or their kernels."""
        ...


def can_be_stacked(changes: Sequence[object]) -> TypeGuard[Sequence[ScaledDelta]]:
    """Whether `stacked` computes these changes of one layer, apart from what dropout would leave out."""
    return all(
        isinstance(change, ScaledDelta)
        and isinstance(change.layer, nn.Linear)
        and isinstance(change.delta, Paired)
        and change.scalar is None
        and change.noise_ranks is None
        for change in changes
    )


def stacked(changes: Sequence[ScaledDelta], x: Tensor, base: Forward, strengths: Sequence[float]) -> Tensor:
    """What the layer computes where change m acts on the m-th of M equal parts of x, along its first axis.

    Factors of lower rank are filled up with zeros, which add nothing. The layer itself runs once over all rows.
    """
    columns = [change.columns() for change in changes]
    rows_MNI = x.reshape(len(changes), -1, x.shape[-1])
    whole_M1I = whole_columns(columns, strengths)
    out = base(x if whole_M1I is None else scale_columns(rows_MNI, whole_M1I).view_as(x))
    downs_MRI, ups_MOR = padded_factors(changes, columns, strengths)
    hidden_MNR = torch.bmm(in_dtype_of(downs_MRI, rows_MNI), downs_MRI.transpose(1, 2))
    if hidden_MNR.dtype == out.dtype and out.is_contiguous():
        flat_MNO = out.view(len(changes), -1, out.shape[-1])
        return torch.baddbmm(flat_MNO, hidden_MNR, ups_MOR.transpose(1, 2)).view_as(out)
    return out + torch.bmm(hidden_MNR, ups_MOR.transpose(1, 2)).to(out.dtype).view_as(out)


def whole_columns(columns: Sequence[Tensor | None], strengths: Sequence[float]) -> Tensor | None:
    """What the input features of each change's rows are multiplied by for the layer; None where nothing is."""
    like = next((one for one in columns if one is not None), None)
    if like is None:
        return None
    whole = [
        torch.ones_like(like) if one is None else one if strength == 1 else 1 + strength * (one - 1)
        for one, strength in zip(columns, strengths, strict=True)
    ]
    return torch.stack(whole)


def padded_factors(
    changes: Sequence[ScaledDelta], columns: Sequence[Tensor | None], strengths: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(downs_MRI, ups_MOR): all factors, with columns, strength and alpha / rank multiplied in."""
    pairs = [paired(change.delta).pair() for change in changes]
    most = max(len(down_RI) for down_RI, _ in pairs)
    downs, ups = [], []
    for change, one, strength, (down_RI, up_OR) in zip(changes, columns, strengths, pairs, strict=True):
        scale, missing = strength * change.scale, most - len(down_RI)
        down_RI = down_RI if one is None else down_RI * one.to(down_RI.dtype)
        up_OR = up_OR if scale == 1 else up_OR * scale
        downs.append(pad(down_RI, (0, 0, 0, missing)) if missing else down_RI)
        ups.append(pad(up_OR, (0, missing)) if missing else up_OR)
    return torch.stack(downs), torch.stack(ups)


def paired(delta: object) -> Paired:
    assert isinstance(delta, Paired)
    return delta
