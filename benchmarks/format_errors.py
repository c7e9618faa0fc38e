"""Measure what each value of --base_format costs: errors of a Linear layer's output y and input gradient dx, and time.

The reference is float64; x, weight and gradient are normally distributed. The first table has the errors with the
decoded weight, relative to the exact one. For "outliers", one input in 500 has weights 30 times as large, as in layers
of trained models. "decoding" is the time to decode a weight, relative to its product with `--tokens` tokens. The second
table has the errors of products with 8-bit codes (--base_arithmetic 8bit), relative to those with the decoded weight.
For "outlier", one channel of the input is 30 times as large as the others. Its times are those of y and dx together, as
ratios to the decoded weight (decoding included) and to a bf16 weight. Times are the fastest of several passes, which
take turns. docs/memory.md has their figures.

    python -m benchmarks format_errors
    python -m benchmarks format_errors --device cuda --tokens 4608

On a CPU, torch multiplies 8-bit floats one by one, so products with fp8 are measured on a small matrix there.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.runner import measurement
from library.base.command_parser import make_parser
from library.memory.codecs.codec import Codec, Parts
from library.memory.codecs.weight_format import load_format
from library.memory.products_8bit import input_gradient, output
from library.options.machine.base_formats import BASE_FORMATS

HEADINGS = ("`--base_format`", "bytes a weight", "y", "dx", "y, outliers", "dx, outliers", "decoding")
HEADINGS_8_BIT = ("format", "tokens", "outputs x inputs", "y", "y, outlier", "dx", "/ decoded", "/ bf16")
SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288))  # outputs, inputs of FLUX.1's layers
SMALL_TOKENS, SMALL_SIDE = 32, 512  # for products with fp8 on a CPU


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def fastest(works: list[Callable[[], object]], device: torch.device, passes: int) -> list[float]:
    """Return the fewest seconds of each, after one pass that is not counted."""

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    turns = [[seconds(work) for work in works] for _ in range(passes + 1)]
    return [min(found) for found in zip(*turns[1:], strict=True)]


def num_bytes(parts: Parts) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


def errors_of(codec: Codec, side: int, tokens: int = 1024) -> list[float]:
    """Return the relative errors of y and dx, first without and then with outliers in the weight."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, side, generator=generator)
    gradient = torch.randn(tokens, side, generator=generator)
    weight = torch.randn(side, side, generator=generator) / side**0.5
    outliers = torch.ones(side)
    outliers[torch.randperm(side, generator=generator)[: side // 500]] = 30
    errors: list[float] = []
    for exact in (weight, weight * outliers):
        stored = codec.decode(codec.encode(exact.bfloat16()), exact.shape, torch.float32)
        errors.append(error(x @ stored.T, x.double() @ exact.double().T))
        errors.append(error(gradient @ stored, gradient.double() @ exact.double()))
    return errors


def compare_8_bit(codec: Codec, tokens: int, num_out: int, num_in: int, device: torch.device, passes: int) -> list[str]:
    """Return the cells of one row of the second table, from the errors on."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_out, num_in, generator=generator).to(device, torch.bfloat16) / num_in**0.5
    gradient = torch.randn(tokens, num_out, generator=generator).to(device, torch.bfloat16)
    parts = codec.encode(weight)
    codes = codec.codes(parts)
    assert codes is not None
    decoded = codec.decode(parts, weight.shape, torch.float64)
    found: list[float] = []
    for factor in (1, 30):
        x = torch.randn(tokens, num_in, generator=generator)
        x[:, 7] *= factor
        x = x.to(device, torch.bfloat16)
        found.append(error(output(x, codes, None), x.double() @ decoded.T))
    found.append(error(input_gradient(gradient, codes), gradient.double() @ decoded))

    def decode() -> Tensor:
        return codec.decode(parts, weight.shape, torch.bfloat16)

    works: list[Callable[[], object]] = [
        lambda: (output(x, codes, None), input_gradient(gradient, codes)),
        lambda: (x @ decode().t(), gradient @ decode()),
        lambda: (x @ weight.t(), gradient @ weight),
    ]
    direct, by_decoding, whole = fastest(works, device, passes)
    return [*(f"{100 * share:.2f} %" for share in found), f"{direct / by_decoding:.2f}", f"{direct / whole:.2f}"]


def rows(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, ...]]:
    """Yield the rows of both tables, headings included."""
    yield HEADINGS
    x = torch.randn(args.tokens, args.side, device=device).bfloat16()
    weight = (torch.randn(args.side, args.side, device=device) / args.side**0.5).bfloat16()
    for name in BASE_FORMATS:
        codec = load_format(name).codec
        parts = codec.encode(weight)
        works: list[Callable[[], object]] = [
            lambda: codec.decode(parts, weight.shape, torch.bfloat16),  # noqa: B023
            lambda: x @ weight.T,
        ]
        decoding, product = fastest(works, device, args.passes)
        shares = [f"{100 * share:.2f} %" for share in errors_of(codec, args.side, args.tokens)]
        yield f"`{name}`", f"{num_bytes(parts) / weight.numel():.3f}", *shares, f"{decoding / product:.2f}"
    yield HEADINGS_8_BIT
    for name in BASE_FORMATS:
        is_small = name == "fp8" and device.type == "cpu"
        tokens = SMALL_TOKENS if is_small else args.tokens
        wanted = load_format(name)
        for num_out, num_in in ((SMALL_SIDE, SMALL_SIDE),) if is_small else SHAPES:
            if wanted.supports_8bit_matmul:
                cells = compare_8_bit(wanted.codec, tokens, num_out, num_in, device, args.passes)
                yield name, str(tokens), f"{num_out} x {num_in}", *cells


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--side", type=int, default=3072, help="rows and columns; the default is FLUX.1's attention")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=5)
    return parser


def print_tables(args: argparse.Namespace) -> None:
    for row in rows(args, torch.device(args.device)):
        print(f"| {' | '.join(row)} |", flush=True)
        if row in (HEADINGS, HEADINGS_8_BIT):
            print("|---" * len(row) + "|")


main = measurement(setup_parser, print_tables)
