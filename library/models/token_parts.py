"""Operations on a sequence whose parts have a modulation each, such as the noisy image and clean references.

Letters: B samples, T tokens, M model width, R parts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from library.models.fused_norms import gated_sum


def by_parts(
    operation: Callable[..., Tensor], lengths: Sequence[int], tokens: Sequence[Tensor], rows: Sequence[Tensor]
) -> Tensor:
    """Run an operation on each part of `tokens`, BTM each, with its row of each of `rows`, BRM; return BTM.

    `lengths` are the tokens of each part. The operation takes the tokens, then the rows, (B, 1, M) each.
    """
    if len(lengths) == 1:
        return operation(*tokens, *rows)
    parts = zip(*(torch.split(x_BTM, [*lengths], dim=1) for x_BTM in tokens), strict=True)
    done = [operation(*part, *(row_BRM[:, r, None] for row_BRM in rows)) for r, part in enumerate(parts)]
    return torch.cat(done, dim=1)


def add_gated(x_BTM: Tensor, gates_BRM: Tensor, y_BTM: Tensor, lengths: Sequence[int]) -> Tensor:
    """Add tokens `y_BTM` times the gates of their part."""
    return by_parts(lambda x, y, gate: gated_sum(x, gate, y), lengths, [x_BTM, y_BTM], [gates_BRM])
