"""Measure the rounding error of a Linear layer for each value of --base_format: output y and input gradient dx.

The reference is float64 with the exact weight; x, weight and gradient are normally distributed. For "outliers", one
input in 500 has weights 30 times as large, as in layers of trained models. Prints the table of docs/memory.md with one
more column: the time to decode one FLUX.1 weight, relative to its product with 1024 tokens on this machine.

    python benchmarks/format_errors.py
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.memory.codecs.codec import Codec, Parts  # noqa: E402
from library.memory.codecs.weight_format import load_format  # noqa: E402
from library.options.machine.base_formats import BASE_FORMATS  # noqa: E402

TOKENS = 1024
HEADINGS = ("`--base_format`", "bytes a weight", "y", "dx", "y, outliers", "dx, outliers", "decoding")


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def seconds(work: Callable[[], object], times: int = 5) -> float:
    work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def num_bytes(parts: Parts) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


def errors_of(codec: Codec, side: int) -> list[float]:
    """Return the relative errors of y and dx, first without and then with outliers in the weight."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, side, generator=generator)
    gradient = torch.randn(TOKENS, side, generator=generator)
    weight = torch.randn(side, side, generator=generator) / side**0.5
    outliers = torch.ones(side)
    outliers[torch.randperm(side, generator=generator)[: side // 500]] = 30
    errors: list[float] = []
    for exact in (weight, weight * outliers):
        stored = codec.decode(codec.encode(exact.bfloat16()), exact.shape, torch.float32)
        errors.append(error(x @ stored.T, x.double() @ exact.double().T))
        errors.append(error(gradient @ stored, gradient.double() @ exact.double()))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=3072, help="rows and columns; the default is FLUX.1's attention")
    side = parser.parse_args().side
    x, weight = torch.randn(TOKENS, side).bfloat16(), (torch.randn(side, side) / side**0.5).bfloat16()
    print(f"| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|")
    product = seconds(lambda: x @ weight.T)
    for name in BASE_FORMATS:
        codec = load_format(name).codec
        parts = codec.encode(weight)
        ratio = seconds(lambda: codec.decode(parts, weight.shape, torch.bfloat16)) / product  # noqa: B023
        shares = " | ".join(f"{100 * value:.2f} %" for value in errors_of(codec, side))
        print(f"| `{name}` | {num_bytes(parts) / weight.numel():.3f} | {shares} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
