"""--base_arithmetic 8bit: whether this machine can multiply in 8 bits, and what it brings."""

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from library.checkpoints.weights import without_values
from library.errors import UserError
from library.memory.codecs.codec import AS_IN_FILE
from library.memory.codecs.matmul_8bit import Codes, input_gradient, output
from library.memory.codecs.weight_format import load_format
from library.memory.frozen import FrozenLinear, frozen_layers
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.models.compute import Compute
from networks.core.protocol import OURS

logger = logging.getLogger(__name__)

SMALL, LARGE_ON_CARD, LARGE_ON_CPU = 128, 4096, 1024  # sides of the matrices that are tried
MOST_SECONDS = 0.005  # of a small product: where one takes longer, a large one is not tried
MOST_ERROR = 0.1  # of what a product gives: fp8 is off by 3 to 4 %
NEEDS = "int8 needs a card of compute capability 7.5 (RTX 20), 8-bit floating point 8.9 (RTX 40, H100)"


def check_arithmetic(options: TrainOptions, arch: Architecture, compute: Compute) -> None:
    """Try a product of the kinds that the run needs on its device, and say how fast it is.

    Raises UserError, before weights are read, where there is nothing to multiply so or the device cannot.
    """
    if not options.precision.multiplies_codes:
        return
    name, module = options.precision.denoiser_format, options.network.network_module
    kinds = {kind_of(name)} if name is not None else kinds_in_file(arch)
    for kind in sorted(kinds, key=str):
        try_kind(kind, compute)
    if module is not None and not module.startswith(OURS):
        logger.warning(
            "--base_arithmetic 8bit: layers that --network_module %s adapts multiply in 8 bits only where it calls "
            "them; where it computes with their weights these are decoded",
            module,
        )


def kind_of(name: str) -> torch.dtype:
    """The format of the codes of a value of --base_format."""
    codec = load_format(name).codec
    codes = codec.codes(codec.encode(torch.ones(1, 8)))
    assert codes is not None, "options refuse other formats"
    return codes.codes_OI.dtype


def kinds_in_file(arch: Architecture) -> set[torch.dtype]:
    """The formats of the codes that the checkpoint has. Raises UserError where none can be multiplied."""
    layers = frozen_layers(without_values(arch.load).denoiser(AS_IN_FILE))
    found = [layer.decoder.codes(layer.own_parts()) for layer in layers if isinstance(layer, FrozenLinear)]
    kinds = {codes.codes_OI.dtype for codes in found if codes is not None and codes.can_be_multiplied}
    if not kinds:
        raise UserError(
            "--base_arithmetic 8bit multiplies weights that are stored in 8 bits, and the checkpoint has none that can "
            "be; add --base_format int8_rotated"
        )
    return kinds


def try_kind(kind: torch.dtype, compute: Compute) -> None:
    """Multiply small matrices, and large ones where that is fast. Raises UserError where it fails or is wrong."""
    device, name = compute.device, str(kind).removeprefix("torch.")
    try:
        error = error_of(*made_up(kind, SMALL, compute))
        seconds, decoded = times_of(kind, SMALL, compute)
        side = SMALL
        if seconds < MOST_SECONDS:
            side = LARGE_ON_CARD if device.type == "cuda" else LARGE_ON_CPU
            seconds, decoded = times_of(kind, side, compute)
    except (RuntimeError, NotImplementedError, ValueError) as failure:
        raise UserError(
            f"--base_arithmetic 8bit: {name_of(device)} with torch {torch.__version__} cannot multiply {name} "
            f"({str(failure).splitlines()[0]}); {NEEDS}. Leave out --base_arithmetic, or store the weights in another "
            "--base_format"
        ) from failure
    if not error < MOST_ERROR:
        raise UserError(
            f"--base_arithmetic 8bit: a product of {name} on {name_of(device)} is off by {error:.0%}; leave it out"
        )
    level = logging.WARNING if seconds > decoded else logging.INFO
    logger.log(
        level,
        "--base_arithmetic 8bit: matrices of %d x %d in %s, multiplied forward and backward, take %.2f of the time of "
        "decoded ones on %s%s",
        side,
        side,
        name,
        seconds / decoded,
        name_of(device),
        ": leave it out here" if level == logging.WARNING else "",
    )


def made_up(kind: torch.dtype, side: int, compute: Compute) -> tuple[Tensor, Codes]:
    """An input and a weight, both square."""
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(side, side, generator=generator).to(compute.device, compute.dtype)
    codes_OI = (40 * torch.randn(side, side, generator=generator)).clamp(-127, 127).to(compute.device).to(kind)
    return x, Codes(codes_OI, torch.tensor(0.01, device=compute.device))


def error_of(x: Tensor, weight: Codes) -> float:
    """How far products are off, as shares of their size, the worse of output and gradient."""
    whole = weight.codes_OI.double().cpu() * weight.scales.double().cpu()
    exact = x.double().cpu()

    def share(found: Tensor, wanted: Tensor) -> float:
        return float((found.double().cpu() - wanted).norm() / wanted.norm())

    return max(share(output(x, weight, None), exact @ whole.t()), share(input_gradient(x, weight), exact @ whole))


def times_of(kind: torch.dtype, side: int, compute: Compute) -> tuple[float, float]:
    """Seconds of output and gradient together, with the codes and with the decoded weight."""
    x, weight = made_up(kind, side, compute)

    def with_codes() -> None:
        output(x, weight, None)
        input_gradient(x, weight)

    def decoded() -> None:
        for _ in range(2):  # which comes for each of the two
            whole = weight.codes_OI.to(x.dtype) * weight.scales.to(x.dtype)
            x @ whole

    return best_seconds(with_codes, compute.device), best_seconds(decoded, compute.device)


def best_seconds(run: Callable[[], None], device: torch.device) -> float:
    """The fastest of three runs after a first one."""

    def seconds() -> Iterator[float]:
        for _ in range(4):
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield time.perf_counter() - began

    return min(list(seconds())[1:])


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
