"""Every mode that saves memory trains the same: gradients of all adapters against those of the plain mode, exactly.

A form rounds the weights once; its reference is the plain mode with the weights as they were rounded. What a form does
to the weights themselves is held in test_forms.py.
"""

import pytest
import torch

from tests.parity.modes import Mode, gradients, pairs_of_modes, triples_of_modes

PAIRS = pairs_of_modes()
DECODED: dict[tuple[str, str, str], list[torch.Tensor]] = {}


def reference(mode: Mode) -> list[torch.Tensor]:
    """The plain mode with the same base model, weights and adapter; kept, since several modes share it."""
    key = mode.base, mode.form, mode.adapter
    if key not in DECODED:
        DECODED[key] = gradients(Mode(mode.base, mode.form, adapter=mode.adapter), is_decoded=True)
    return DECODED[key]


def check(mode: Mode) -> None:
    found, wanted = gradients(mode), reference(mode)
    assert len(found) == len(wanted) > 10
    assert all(bool(value.isfinite().all()) for value in found)
    assert sum(bool(value.any()) for value in wanted) > len(wanted) / 2
    # Contiguous and channels-last weights go through different kernels of convolutions, which add in another order.
    tolerance = 1e-4 if mode.base == "sd" else 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + (1e-9 if tolerance else 0)


@pytest.mark.parametrize("mode", PAIRS, ids=str)
def test_pairs_of_modes_train_as_the_plain_mode(mode: Mode) -> None:
    check(mode)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", [mode for mode in triples_of_modes() if mode not in PAIRS], ids=str)
def test_triples_of_modes_train_as_the_plain_mode(mode: Mode) -> None:
    check(mode)


MULTIPLIED = [
    Mode("flux", "int8_rotated", "streamed", "recompute", "dora"),
    Mode("sd", "int8", "streamed", "recompute_every_2", "lora"),
    Mode("anima", "fp8", "device", "recompute_from_main_memory", "lokr"),
]


@pytest.mark.parametrize("mode", MULTIPLIED, ids=str)
def test_products_in_8_bits_are_the_same_in_every_mode_and_near_the_decoded_ones(mode: Mode) -> None:
    """Bounds: rounding of activations and gradients, a few percent in each of about ten layers, adds up."""
    found = gradients(mode, is_multiplied=True)
    plain = gradients(Mode(mode.base, mode.form, adapter=mode.adapter), is_multiplied=True)
    assert len(found) == len(plain) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
    decoded = reference(mode)
    off = [float((a - b).norm() / b.norm()) for a, b in zip(found, decoded, strict=True) if b.any()]
    assert 1e-4 < sorted(off)[len(off) // 2] < 0.2
