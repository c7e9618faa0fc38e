"""Rotary positions: products of complex numbers and sums are the same turn."""

import pytest
import torch

from library.models import rotary
from library.models.rotary import Rotary, apply_rope


@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_turning_are_rotations_by_the_angles(
    dtype: torch.dtype, is_strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(31)
    positions = torch.randint(0, 9, (7, 2), generator=generator)
    rope = Rotary((16, 16))(positions, (9, 9))
    x = torch.randn(2, 7, 3, 32, generator=generator).to(dtype)
    x = x.transpose(1, 2) if is_strided else x.transpose(1, 2).contiguous()
    angles = torch.cat([positions[:, a, None] * 10_000.0 ** -(torch.arange(0, 16, 2).double() / 16) for a in (0, 1)], 1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    wanted = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    weights = torch.randn(2, 3, 7, 32, generator=generator)
    found = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(rotary, "HAVE_COMPLEX", devices)
        one = x.detach().clone().requires_grad_()
        y = apply_rope(one, rope)
        assert y.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
        found.append((y, torch.autograd.grad((y.float() * weights).sum(), one)[0]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_tables_of_an_axis_are_made_once_for_each_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], rotary.axis_table

    def watched(width: int, extent: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
        made.append((width, extent))
        return make(width, extent, base)

    monkeypatch.setattr(rotary, "axis_table", watched)
    turning, generator = Rotary((4, 8)), torch.Generator().manual_seed(32)
    found = []
    for extents in ((5, 6), (6, 5), (5, 6)):
        positions = torch.stack([torch.randint(0, extent, (7,), generator=generator) for extent in extents], -1)
        found.append((positions, turning(positions, extents)))
    assert sorted(made) == [(4, 5), (4, 6), (8, 5), (8, 6)]
    for positions, rope in found:
        torch.testing.assert_close(rope, Rotary((4, 8))(positions, (6, 6)), rtol=0, atol=0)
