"""Convolutions of few pixels against torch's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from library.memory import small_convolutions
from library.memory.codecs.plain import Plain
from library.memory.devices import move_to_device
from library.memory.frozen import freeze_layer

SHAPES = [
    # kernel, stride, padding, images
    (3, 1, 1, (2, 5, 3, 4)),
    (3, 2, 1, (1, 5, 6, 5)),
    (1, 1, 0, (2, 5, 4, 4)),
    (1, 2, 0, (1, 5, 5, 5)),
    (1, 1, 0, (2, 5, 9, 8)),  # more pixels than channels
    ((3, 2), (1, 2), (2, 0), (2, 5, 3, 6)),
]


@contextmanager
def count_calls() -> Iterator[list[str]]:
    """Record the calls that take the fast path, forward and backward."""
    fast_calls: list[str] = []

    def spying(name: str) -> Any:
        original = getattr(small_convolutions, name)

        def call(*args: Any) -> Tensor:
            fast_calls.append(name)
            result: Tensor = original(*args)
            return result

        return call

    with patch.multiple(small_convolutions, **{name: spying(name) for name in ("output", "input_gradient")}):
        yield fast_calls


def frozen(layer: nn.Conv2d) -> nn.Conv2d:
    placed = move_to_device(nn.Sequential(layer), torch.device("cpu")).requires_grad_(False)
    (inner,) = placed.children()
    assert isinstance(inner, nn.Conv2d)
    return inner


def trained_through(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y: Tensor = layer(x)
    y.backward(gradient)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "images"), SHAPES)
def test_outputs_and_gradients_are_those_of_float64(
    kernel: Any, stride: Any, padding: Any, images: tuple[int, ...], stored: bool
) -> None:
    """Sums are in another order: 45 float32 products, 1e-6 of the largest value."""
    torch.manual_seed(31)
    layer = nn.Conv2d(5, 67, kernel, stride, padding)
    exact = deepcopy(layer).double()
    x = torch.randn(images).to(memory_format=torch.channels_last)
    gradient = torch.randn_like(layer(x))
    if stored:
        freeze_layer(Plain(), layer)
    adapted = frozen(layer)
    with count_calls() as fast_calls:
        y, x_gradient = trained_through(adapted, x, gradient)
    assert fast_calls == ["output", "input_gradient"]
    exact_y, exact_gradient = trained_through(exact, x.double(), gradient.double())
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-6, atol=1e-6 * exact_y.abs().max().item())
    torch.testing.assert_close(
        x_gradient.double(), exact_gradient, rtol=1e-6, atol=1e-6 * exact_gradient.abs().max().item()
    )
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (nn.Conv2d(5, 9, 3, padding=1), 3),
        (nn.Conv2d(6, 12, 3, padding=1, groups=2), 3),
        (nn.Conv2d(5, 12, 3, padding=2, dilation=2), 3),
        (nn.Conv2d(5, 12, 3, padding="same"), 3),
        (nn.Conv2d(5, 12, 3, padding=1, padding_mode="circular"), 3),
    ],
    ids=["as many pixels as channels", "groups", "dilation", "named padding", "circular"],
)
def test_cases_without_a_gain_or_with_another_geometry_are_left_to_torch(layer: nn.Conv2d, side: int) -> None:
    x = torch.randn(1, layer.in_channels, side, side, generator=torch.Generator().manual_seed(37))
    expected = layer(x)
    with count_calls() as fast_calls:
        y = frozen(layer)(x)
    assert not fast_calls
    torch.testing.assert_close(y, expected)


def test_a_weight_that_trains_gets_its_gradient() -> None:
    torch.manual_seed(41)
    layer = frozen(nn.Conv2d(5, 67, 3, padding=1)).requires_grad_(True)
    with count_calls() as fast_calls:
        layer(torch.randn(1, 5, 3, 3)).square().sum().backward()
    assert not fast_calls and layer.weight.grad is not None


def test_autocast_sets_the_compute_dtype_and_input_gradients_keep_the_input_dtype() -> None:
    torch.manual_seed(43)
    layer = nn.Conv2d(5, 67, 3, padding=1).bfloat16()
    exact = deepcopy(layer).double()
    adapted = frozen(layer)
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    with count_calls() as fast_calls:
        with torch.autocast("cpu", torch.bfloat16):
            y = adapted(x)
        y.float().sum().backward()
    assert fast_calls == ["output", "input_gradient"] and y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact(x.detach().bfloat16().double()), rtol=2**-7, atol=2**-7)


def test_operations_are_counted_as_for_a_plain_convolution() -> None:
    layer = nn.Conv2d(5, 67, 3, padding=1)
    x = torch.randn(2, 5, 3, 4, requires_grad=True)

    def operations(convolution: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            convolution(x).sum().backward()
        total: int = counter.get_total_flops()
        return total

    assert operations(layer.requires_grad_(False)) == operations(frozen(layer)) == 2 * 2 * 67 * 5 * 9 * 2 * 12
