"""Arithmetic on products of two small matrices, without building the product.

Letters: O rows of the product, N its columns, R rank of the factors, K = min(O, N, R) singular values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OVERSAMPLED = 8  # random vectors in addition to the requested rank
MIN_SINGULAR_VALUE = 1e-6  # a module with no larger singular value counts as unchanged


def svd_of_product(up_OR: Tensor, down_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U_OK, S_K, V_KN) with up @ down = U * S @ V and S descending: the exact SVD, from QR of both factors.

    The cost is O(R^2 (O + N)) instead of O(O N min(O, N)) for the SVD of the product.
    """
    left_OK, upper_KR = torch.linalg.qr(up_OR)
    right_NK, lower_KR = torch.linalg.qr(down_RN.T)
    u, s, v = torch.linalg.svd(upper_KR @ lower_KR.T, full_matrices=False)
    return left_OK @ u, s, v @ right_NK.T


def largest_of_product(
    up_OR: Tensor, down_RN: Tensor, rank: int, num_iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Approximate the r largest singular values of the product: (U_Or, S_r, V_rN, Frobenius norm of the product).

    The range is estimated with r + 8 random vectors and refined by power iterations (Halko, Martinsson and Tropp 2011,
    algorithms 4.4 and 5.1). Singular values that decay slowly need more iterations. It is for products of high rank,
    whose exact decomposition costs O(K^3). `generator` must be on the CPU.
    """
    left_OK, upper_KR = torch.linalg.qr(up_OR)
    right_NK, lower_KR = torch.linalg.qr(down_RN.T)
    core_KK = upper_KR @ lower_KR.T
    num_vectors = min(rank + OVERSAMPLED, *core_KK.shape)
    # Drawn on the CPU and then moved, so that a file gives the same result on every device.
    random = torch.randn(core_KK.shape[1], num_vectors, generator=generator)
    range_Kq, _ = torch.linalg.qr(core_KK @ random.to(core_KK))
    for _ in range(num_iterations):
        other_Kq, _ = torch.linalg.qr(core_KK.T @ range_Kq)
        range_Kq, _ = torch.linalg.qr(core_KK @ other_Kq)
    u, s, v = torch.linalg.svd(range_Kq.T @ core_KK, full_matrices=False)
    return left_OK @ (range_Kq @ u[:, :rank]), s[:rank], v[:rank] @ right_NK.T, float(core_KK.norm())


def balance(u_OK: Tensor, s_K: Tensor, v_KN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (up_Or, down_rN), the best product of rank r, with factors of equal norm, which suits half precision."""
    root_r = s_K[:rank].clamp(min=0).sqrt()
    return u_OK[:, :rank] * root_r, root_r[:, None] * v_KN[:rank]


def concatenate(factors: Sequence[tuple[Tensor, Tensor]], strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (up_OR, down_RN) whose product is the sum of strength * up @ down. The ranks add up."""
    ups = [strength * up_OR for (up_OR, _), strength in zip(factors, strengths, strict=True)]
    return torch.cat(ups, 1), torch.cat([down_RN for _, down_RN in factors], 0)


def rank_by_ratio(s_K: Tensor, ratio: float) -> int:
    """Return the number of singular values above the largest one divided by `ratio`, at least 1."""
    return max(int((s_K > s_K[0] / ratio).sum()), 1)


def rank_by_sum(s_K: Tensor, share: float) -> int:
    """Return the smallest rank whose singular values reach `share` of the sum of all."""
    return _first_reaching(s_K, share)


def rank_by_norm(s_K: Tensor, share: float) -> int:
    """Return the smallest rank that keeps `share` of the Frobenius norm."""
    return _first_reaching(s_K**2, share**2)


def _first_reaching(values_K: Tensor, share: float) -> int:
    sums_K = values_K.cpu().double().cumsum(0)  # some devices have no float64
    return min(int((sums_K < share * sums_K[-1]).sum()) + 1, len(values_K))


def best_factors(matrix_ON: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (up_Or, down_rN), the best product of rank r = min(rank, O, N) for a matrix, with factors of equal norm.

    The singular vectors of the shorter side come from its Gram matrix; the other side is the projection onto them. This
    takes a fraction of the time of an SVD. For float32 accuracy pass float64.
    """
    if matrix_ON.shape[0] > matrix_ON.shape[1]:
        down_rN, up_Or = best_factors(matrix_ON.T, rank)
        return up_Or.T, down_rN.T
    _, vectors_OO = torch.linalg.eigh(matrix_ON @ matrix_ON.T)
    u_Or = vectors_OO.flip(1)[:, :rank]
    projected_rN = u_Or.T @ matrix_ON
    s_r = torch.linalg.vector_norm(projected_rN, dim=1)
    root_r = s_r.sqrt()
    # A direction without any weight stays zero instead of becoming 0 * inf.
    return u_Or * root_r, projected_rN * torch.where(s_r > 0, 1 / root_r, 0)[:, None]


def clamp_factors(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Clamp both factors to the given quantile of all their values, and to its negative."""
    values = torch.cat([up.flatten(), down.flatten()])
    # torch.quantile refuses more than 2^24 values.
    limit = float(values.kthvalue(max(round(quantile * len(values)), 1)).values)
    return up.clamp(-limit, limit), down.clamp(-limit, limit)
