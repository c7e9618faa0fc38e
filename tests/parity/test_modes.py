"""Every memory mode gives exactly the adapter gradients of the plain mode.

A weight format rounds the weights once, so its reference is the plain mode with the rounded weights. test_forms.py
tests the rounding itself.
"""

import pytest
import torch

from tests.parity.modes import Mode, gradients, pairs_of_modes, triples_of_modes

PAIRS = pairs_of_modes()
DECODED: dict[tuple[str, str, str], list[torch.Tensor]] = {}


def reference(mode: Mode) -> list[torch.Tensor]:
    """Return the plain mode's gradients for the same base model, weights and adapter; cached, as modes share them."""
    key = mode.base, mode.form, mode.adapter
    if key not in DECODED:
        DECODED[key] = gradients(Mode(mode.base, mode.form, adapter=mode.adapter), is_decoded=True)
    return DECODED[key]


def check(mode: Mode) -> None:
    actual, wanted = gradients(mode), reference(mode)
    assert len(actual) == len(wanted) > 10
    assert all(bool(value.isfinite().all()) for value in actual)
    assert sum(bool(value.any()) for value in wanted) > len(wanted) / 2
    # Contiguous and channels-last weights use different convolution kernels, which sum in another order.
    tolerance = 1e-4 if mode.base == "sd" else 0.0
    for ours, theirs in zip(actual, wanted, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + (1e-9 if tolerance else 0)


@pytest.mark.parametrize("mode", PAIRS, ids=str)
def test_pairs_of_modes_train_like_the_plain_mode(mode: Mode) -> None:
    check(mode)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", [mode for mode in triples_of_modes() if mode not in PAIRS], ids=str)
def test_triples_of_modes_train_like_the_plain_mode(mode: Mode) -> None:
    check(mode)


MULTIPLIED = [
    Mode("flux", "int8_rotated", "streamed", "recompute", "dora"),
    Mode("sd", "int8", "streamed", "recompute_every_2", "lora"),
    Mode("anima", "fp8", "device", "recompute_from_main_memory", "lokr"),
]


@pytest.mark.parametrize("mode", MULTIPLIED, ids=str)
def test_8_bit_matmul_is_equal_in_every_mode_and_close_to_dequantised_matmul(mode: Mode) -> None:
    """The bounds allow for accumulated rounding of activations and gradients, a few percent in each of ten layers."""
    actual = gradients(mode, is_multiplied=True)
    plain = gradients(Mode(mode.base, mode.form, adapter=mode.adapter), is_multiplied=True)
    assert len(actual) == len(plain) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, plain, strict=True))
    decoded = reference(mode)
    off = [float((a - b).norm() / b.norm()) for a, b in zip(actual, decoded, strict=True) if b.any()]
    assert 1e-4 < sorted(off)[len(off) // 2] < 0.2
