"""Singular values computed from small factors equal those of the full matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from networks.core.changes.svd import (
    balance,
    best_factors,
    clamp_factors,
    concatenate,
    rank_by_norm,
    rank_by_ratio,
    rank_by_sum,
    svd_of_product,
)
from tests.tolerances import EXACT, FLOAT64


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_decomposition_of_a_product_equals_that_of_the_full_matrix(o: int, n: int, r: int, seed: int) -> None:
    up, down = randn(seed, o, r), randn(seed + 1, r, n)
    u, s, v = svd_of_product(up, down)
    torch.testing.assert_close(u * s @ v, up @ down, **FLOAT64)
    full = torch.linalg.svdvals(up @ down)[: len(s)]
    torch.testing.assert_close(s[: len(full)], full, rtol=1e-8, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 10), n=st.integers(1, 10), rank=st.integers(1, 10), seed=st.integers(0, 2**31))
def test_best_factors_miss_only_the_smallest_singular_values(o: int, n: int, rank: int, seed: int) -> None:
    matrix = randn(seed, o, n)
    up, down = best_factors(matrix, rank)
    missed = torch.linalg.svdvals(matrix)[rank:].norm()
    assert up.shape[1] == down.shape[0] == min(rank, o, n)
    torch.testing.assert_close((matrix - up @ down).norm(), missed, rtol=1e-6, atol=1e-7)


def test_best_factors_of_a_zero_matrix_are_zero() -> None:
    up, down = best_factors(torch.zeros(4, 3, dtype=torch.float64), 2)
    assert not (up.any() or down.any())


def test_balanced_factors_have_equal_norms_and_the_best_product() -> None:
    u, s, v = svd_of_product(randn(1, 8, 5), randn(2, 5, 7))
    up, down = balance(u, s, v, 3)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), **FLOAT64)
    torch.testing.assert_close(up @ down, u[:, :3] * s[:3] @ v[:3], **FLOAT64)


def test_concatenated_factors_multiply_to_the_sum() -> None:
    factors = [(randn(3, 6, 2), randn(4, 2, 5)), (randn(5, 6, 3), randn(6, 3, 5))]
    up, down = concatenate(factors, [0.5, -2.0])
    assert down.shape == (5, 5)
    expected = 0.5 * factors[0][0] @ factors[0][1] - 2 * factors[1][0] @ factors[1][1]
    torch.testing.assert_close(up @ down, expected, **FLOAT64)


S = torch.tensor([8.0, 4.0, 2.0, 1.0])


@pytest.mark.parametrize(("most", "rank"), [(1.5, 1), (2.5, 2), (4.1, 3), (100, 4), (8, 3), (1, 1)])
def test_ratio_keeps_values_above_the_largest_over_it(most: float, rank: int) -> None:
    assert rank_by_ratio(S, most) == rank


@pytest.mark.parametrize(("share", "rank"), [(0.1, 1), (8 / 15 + 1e-3, 2), (12 / 15, 2), (0.9, 3), (0.99, 4), (1.0, 4)])
def test_sum_keeps_the_share_of_15(share: float, rank: int) -> None:
    assert rank_by_sum(S, share) == rank


@pytest.mark.parametrize(("share", "rank"), [((64 / 85) ** 0.5 - 1e-3, 1), ((64 / 85) ** 0.5 + 1e-3, 2), (1.0, 4)])
def test_norm_keeps_the_share_of_the_root_of_85(share: float, rank: int) -> None:
    assert rank_by_norm(S, share) == rank


def test_clamping_limits_the_largest_fifth() -> None:
    up, down = clamp_factors(torch.tensor([1.0, -9.0, 3.0]), torch.tensor([4.0, 5.0]), 0.8)
    torch.testing.assert_close(torch.cat([up, down]), torch.tensor([1.0, -4.0, 3.0, 4.0, 4.0]), **EXACT)
