"""Low-rank changes of one layer by several adapters of a sweep, computed in one product on separate rows.

Letters: M changes, N rows of each (samples times positions), O outputs, I inputs, R the largest rank.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from networks.core.changes.change import Forward, Stackable, match_dtype
from networks.core.changes.dora import scale_columns
from networks.core.changes.low_rank import looks_at_one_pixel


def can_be_stacked(changes: Sequence[object]) -> TypeGuard[Sequence[Stackable]]:
    """Return True if `run_stacked` can compute these changes of one layer. Dropout is not checked."""
    return all(
        isinstance(change, Stackable) and looks_at_single_places(change.layer) and change.is_pair for change in changes
    )


def looks_at_single_places(layer: nn.Module | None) -> bool:
    """Return True if the layer multiplies each position or pixel separately: a Linear, or a plain 1x1 convolution."""
    return looks_at_one_pixel(layer) if isinstance(layer, nn.Conv2d) else isinstance(layer, nn.Linear)


def run_stacked(changes: Sequence[Stackable], x: Tensor, base: Forward, strengths: Sequence[float]) -> Tensor:
    """Return the layer's output where change m acts on the m-th of M equal parts of x, along its first axis.

    Factors of lower rank are padded with zeros. The layer itself runs once on all rows.
    """
    columns, is_conv = [change.columns() for change in changes], isinstance(changes[0].layer, nn.Conv2d)
    base_columns = join_columns(columns, strengths)
    shape = (len(changes), -1, *x.shape[1:]) if is_conv else (len(changes), -1, x.shape[-1])
    parts = x.reshape(shape)
    out = base(x if base_columns is None else scale_columns(parts, base_columns).view_as(x))
    downs_MRI, ups_MOR = pad_factors(changes, columns, strengths)
    parts = match_dtype(downs_MRI, parts)
    if is_conv:  # (M, B, I, h, w)
        hidden = downs_MRI[:, None] @ parts.flatten(3)
        return out + (ups_MOR[:, None] @ hidden).to(out.dtype).reshape(out.shape)
    hidden_MNR = torch.bmm(parts, downs_MRI.transpose(1, 2))
    if hidden_MNR.dtype == out.dtype and out.is_contiguous():
        flat_MNO = out.view(len(changes), -1, out.shape[-1])
        # One pass over the outputs instead of two: baddbmm adds the products directly.
        return torch.baddbmm(flat_MNO, hidden_MNR, ups_MOR.transpose(1, 2)).view_as(out)
    return out + torch.bmm(hidden_MNR, ups_MOR.transpose(1, 2)).to(out.dtype).view_as(out)


def join_columns(columns: Sequence[Tensor | None], strengths: Sequence[float]) -> Tensor | None:
    """Return the scales of the layer's input columns for each change's rows, or None if there are none."""
    like = next((scales for scales in columns if scales is not None), None)
    if like is None:
        return None
    joined = [
        torch.ones_like(like) if scales is None else scales if strength == 1 else 1 + strength * (scales - 1)
        for scales, strength in zip(columns, strengths, strict=True)
    ]
    return torch.stack(joined)


def pad_factors(
    changes: Sequence[Stackable], columns: Sequence[Tensor | None], strengths: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return (downs_MRI, ups_MOR): all factors, with columns, strength and alpha / rank multiplied in."""
    pairs = [[factor.flatten(1) for factor in change.pair()] for change in changes]
    max_rank = max(len(down_RI) for down_RI, _ in pairs)
    scales = [strength * change.scale for change, strength in zip(changes, strengths, strict=True)]
    # A scale that all changes share is multiplied in once, after stacking, instead of into every factor.
    common = scales[0] if len(set(scales)) == 1 else 1.0
    downs, ups = [], []
    for scales_I, scale, (down_RI, up_OR) in zip(columns, scales, pairs, strict=True):
        num_missing = max_rank - len(down_RI)
        down_RI = down_RI if scales_I is None else down_RI * scales_I.flatten(1).to(down_RI.dtype)
        up_OR = up_OR if scale == common else up_OR * scale
        downs.append(pad(down_RI, (0, 0, 0, num_missing)) if num_missing else down_RI)
        ups.append(pad(up_OR, (0, num_missing)) if num_missing else up_OR)
    ups_MOR = torch.stack(ups)
    return torch.stack(downs), ups_MOR if common == 1 else ups_MOR * common
