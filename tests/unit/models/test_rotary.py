"""Rotary position embedding: complex and real arithmetic give the same rotation."""

import pytest
import torch

from library.models import rotary
from library.models.rotary import Rotary, apply_rope


@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_and_real_arithmetic_both_rotate_by_the_angles(
    dtype: torch.dtype, is_strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(31)
    positions = torch.randint(0, 9, (7, 2), generator=generator)
    rope = Rotary((16, 16))(positions, (9, 9))
    x = torch.randn(2, 7, 3, 32, generator=generator).to(dtype)
    x = x.transpose(1, 2) if is_strided else x.transpose(1, 2).contiguous()
    angles = torch.cat([positions[:, a, None] * 10_000.0 ** -(torch.arange(0, 16, 2).double() / 16) for a in (0, 1)], 1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    weights = torch.randn(2, 3, 7, 32, generator=generator)
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(rotary, "HAVE_COMPLEX", devices)
        leaf = x.detach().clone().requires_grad_()
        y = apply_rope(leaf, rope)
        assert y.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        results.append((y, torch.autograd.grad((y.float() * weights).sum(), leaf)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_table_of_an_axis_is_built_once_per_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], rotary.axis_table

    def record_call(width: int, extent: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((width, extent))
        return original(width, extent, base)

    monkeypatch.setattr(rotary, "axis_table", record_call)
    rotary_embedding, generator = Rotary((4, 8)), torch.Generator().manual_seed(32)
    results = []
    for extents in ((5, 6), (6, 5), (5, 6)):
        positions = torch.stack([torch.randint(0, extent, (7,), generator=generator) for extent in extents], -1)
        results.append((positions, rotary_embedding(positions, extents)))
    assert sorted(calls) == [(4, 5), (4, 6), (8, 5), (8, 6)]
    for positions, rope in results:
        torch.testing.assert_close(rope, Rotary((4, 8))(positions, (6, 6)), rtol=0, atol=0)
