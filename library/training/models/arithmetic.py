"""Checks that this device supports 8-bit matrix products and computes them correctly."""

import logging

import torch
from torch import Tensor

from library.base.errors import about
from library.checkpoints.weights import to_meta_device
from library.memory.codecs.codec import AS_IN_FILE, Codec
from library.memory.codecs.matmul_8bit import Codes
from library.memory.codecs.weight_format import WeightFormat
from library.memory.frozen import FrozenLinear, frozen_layers
from library.memory.products_8bit import input_gradient, output
from library.protocols import Architecture
from library.training.models.compute import Compute
from networks.core.protocol import NetworkModule

logger = logging.getLogger(__name__)

# On GPUs the kernels need sizes that are multiples of 8 or 16, and torch._int_mm at least 17 rows.
SIDE = 128  # of the test matrices
MOST_ERROR = 0.1  # relative error of a product; fp8 has 3 to 4 %
NEEDS = "int8 needs a GPU of compute capability 7.5 (RTX 20), 8-bit floating point 8.9 (RTX 40, H100)"


def check_arithmetic(
    weight_format: WeightFormat | None, module: NetworkModule, arch: Architecture, compute: Compute
) -> None:
    """Try each kind of 8-bit product that the run needs on its device.

    `weight_format` is the denoiser's, None for that of its file. Raises UserError, before weights are read, if there is
    nothing to multiply in 8 bits or the device cannot.
    """
    kinds = {code_dtype(weight_format.codec)} if weight_format is not None else kinds_in_file(arch)
    for kind in sorted(kinds, key=str):
        try_kind(kind, compute)
    if not module.is_ours:
        logger.warning(
            "--base_arithmetic 8bit: layers that --network_module %s adapts multiply in 8 bits only where it calls "
            "them; where it computes with their weights these are decoded",
            module.name,
        )


def code_dtype(codec: Codec) -> torch.dtype:
    codes = codec.codes(codec.encode(torch.ones(1, 8)))
    assert codes is not None, "options refuse other formats"
    return codes.codes_OI.dtype


def kinds_in_file(arch: Architecture) -> set[torch.dtype]:
    """Return the dtypes of 8-bit codes in the checkpoint. Raises UserError if none can be multiplied."""
    layers = frozen_layers(to_meta_device(arch.load).denoiser(AS_IN_FILE))
    all_codes = [layer.decoder.codes(layer.own_parts()) for layer in layers if isinstance(layer, FrozenLinear)]
    kinds = {codes.codes_OI.dtype for codes in all_codes if codes is not None and codes.can_be_multiplied}
    if not kinds:
        raise about("--base_arithmetic", cause="needs")(
            "8bit multiplies weights that are stored in 8 bits, and the checkpoint has none that can be",
            "add --base_format int8_rotated",
        )
    return kinds


def try_kind(kind: torch.dtype, compute: Compute) -> None:
    """Multiply two small matrices on the device. Raises UserError if that fails or the product is wrong.

    Large matrices are not timed: the gain on a GPU depends on the sizes of a run's layers and images.
    """
    device, name = compute.device, str(kind).removeprefix("torch.")
    try:
        error = measure_error(*make_inputs(kind, SIDE, compute))
    except (RuntimeError, NotImplementedError, ValueError) as failure:
        raise about("--base_arithmetic")(
            f"8bit: {name_device(device)} with torch {torch.__version__} cannot multiply {name} "
            f"({str(failure).splitlines()[0]}); {NEEDS}. Leave out --base_arithmetic, or store the weights in another "
            "--base_format"
        ) from failure
    if not error < MOST_ERROR:
        raise about("--base_arithmetic")(
            f"8bit: a product of {name} on {name_device(device)} is off by {error:.0%}", "leave it out"
        )
    if device.type == "cpu" and kind.is_floating_point:
        logger.warning(
            "--base_arithmetic 8bit: torch multiplies %s on a CPU one number at a time, thousands of times slower than "
            "decoded weights. Use --base_format int8_rotated, or remove --base_arithmetic.",
            name,
        )


def make_inputs(kind: torch.dtype, side: int, compute: Compute) -> tuple[Tensor, Codes]:
    """Return a random input and a random weight, both square."""
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(side, side, generator=generator).to(compute.device, compute.dtype)
    codes_OI = (40 * torch.randn(side, side, generator=generator)).clamp(-127, 127).to(compute.device).to(kind)
    return x, Codes(codes_OI, torch.tensor(0.01, device=compute.device))


def measure_error(x: Tensor, weight: Codes) -> float:
    """Return the relative error of a product, the worse of output and gradient."""
    # On the CPU first: Apple's GPUs have no float64.
    decoded = weight.codes_OI.cpu().double() * weight.scales.cpu().double()
    exact = x.cpu().double()

    def relative_error(product: Tensor, reference: Tensor) -> float:
        return float((product.cpu().double() - reference).norm() / reference.norm())

    return max(
        relative_error(output(x, weight, None), exact @ decoded.t()),
        relative_error(input_gradient(x, weight), exact @ decoded),
    )


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
