"""Attention reports the kernel that CUDA would choose; the expected ones follow torch's sdp_utils.cpp."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.simulated_gpu.device import Simulation

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]
GPU = torch.device("cuda")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def heads(size: int = 64, dtype: torch.dtype = BFLOAT, num: int = 2, length: int = 6, grad: bool = False) -> Tensor:
    return torch.ones(1, num, length, size, device=GPU, dtype=dtype, requires_grad=grad)


def chosen_kernel(simulated_gpu: Simulation, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> str:
    """Return the kernel's name."""
    simulated_gpu.clear()
    scaled_dot_product_attention(q, k, v, **named)
    ((text, count),) = simulated_gpu.attention().items()
    assert count == 1 and "at tests/simulated_gpu/test_attention.py:" in text
    return text.partition(" at ")[0].partition(":")[0]


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "grad", "kernel"),
    [
        (8.9, BFLOAT, 64, True, "flash"),
        (8.9, HALF, 40, True, "flash"),  # head size of SD 1.5, which flash pads
        (8.9, FLOAT, 64, True, "efficient"),
        (8.9, BFLOAT, 200, True, "efficient"),  # flash has no backward pass for this size on small chips
        (8.9, BFLOAT, 200, False, "flash"),
        (8.9, BFLOAT, 256, True, "flash"),
        (8.9, BFLOAT, 512, True, "efficient"),  # head size of a VAE
        (8.9, BFLOAT, 516, True, "math"),  # not a multiple of 8
        (7.5, HALF, 64, True, "efficient"),
        (7.5, FLOAT, 64, True, "efficient"),
        (7.5, BFLOAT, 64, True, "math"),
        (7.5, HALF, 20, True, "math"),
        (7.5, FLOAT, 21, True, "efficient"),
        (8.9, torch.float64, 64, True, "math"),
    ],
)
def test_the_kernel_follows_capability_dtype_and_head_size(
    simulated_gpu: Simulation, capability: float, dtype: torch.dtype, size: int, grad: bool, kernel: str
) -> None:
    x = heads(size, dtype, grad=grad)
    with simulated_gpu.configured(capability=capability):
        assert chosen_kernel(simulated_gpu, x, x, x) == kernel


def test_a_mask_excludes_flash(simulated_gpu: Simulation) -> None:
    x = heads()
    mask = torch.ones(1, 1, 6, 6, device=GPU, dtype=torch.bool)
    assert chosen_kernel(simulated_gpu, x, x, x, attn_mask=mask) == "efficient"
    spread = torch.zeros(1, 1, 6, 1, device=GPU, dtype=BFLOAT).expand(1, 1, 6, 6)  # the last stride is not 1
    assert chosen_kernel(simulated_gpu, x, x, x, attn_mask=spread) == "math"


def test_the_kernel_depends_on_shapes(simulated_gpu: Simulation) -> None:
    x = heads()
    assert chosen_kernel(simulated_gpu, x, heads(length=4), heads(length=4), is_causal=True) == "efficient"
    assert chosen_kernel(simulated_gpu, x[0], x[0], x[0]) == "math"
    assert chosen_kernel(simulated_gpu, heads(num=4), x, x, enable_gqa=True) == "flash"
    assert chosen_kernel(simulated_gpu, x, x, heads(128)) == "efficient"
    sideways = torch.ones(1, 2, 64, 6, device=GPU, dtype=BFLOAT).transpose(2, 3)
    assert chosen_kernel(simulated_gpu, sideways, x, x) == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert chosen_kernel(simulated_gpu, x, x, x) == "efficient"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(RuntimeError, match="No available kernel"):
        scaled_dot_product_attention(heads(dtype=FLOAT), heads(dtype=FLOAT), heads(dtype=FLOAT))


def test_a_call_that_falls_back_is_reported_with_its_shapes(simulated_gpu: Simulation) -> None:
    x = heads(dtype=torch.float64)
    simulated_gpu.clear()
    scaled_dot_product_attention(x, x, x)
    (text,) = simulated_gpu.attention()
    assert text.startswith("math: query Double [1, 2, 6, 64], key Double [1, 2, 6, 64], value Double [1, 2, 6, 64] at ")
