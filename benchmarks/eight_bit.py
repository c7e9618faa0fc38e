"""Compare products with 8-bit codes (--base_arithmetic 8bit) with products with the decoded weight: errors and time.

The errors of the output y and of the input gradient dx are relative to the decoded weight's product in float64. For
"outlier", one channel of the input is 30 times as large as the others. The times are those of y and dx together, the
fastest of several passes, as ratios to the decoded weight (decoding included) and to a bf16 weight, in one run.

    python benchmarks/eight_bit.py
    python benchmarks/eight_bit.py --device cuda --tokens 4608

On a CPU, torch multiplies 8-bit floats one by one, so fp8 is measured on a small matrix there.
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

from library.memory.codecs.matmul_8bit import Codes, input_gradient, output  # noqa: E402
from library.memory.codecs.weight_format import load_format  # noqa: E402
from library.options.machine.base_formats import BASE_FORMATS  # noqa: E402

SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288))  # outputs, inputs of FLUX.1's layers
SMALL_TOKENS, SMALL_SIDE = 32, 512  # for fp8 on a CPU


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def errors(name: str, tokens: int, num_out: int, num_in: int, device: torch.device) -> list[float]:
    """Return the relative errors of y, of y with an outlier in the input, and of dx."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_out, num_in, generator=generator).to(device, torch.bfloat16) / num_in**0.5
    gradient = torch.randn(tokens, num_out, generator=generator).to(device, torch.bfloat16)
    codec = load_format(name).codec
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
    return found


def seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def times(name: str, tokens: int, num_out: int, num_in: int, device: torch.device, passes: int) -> list[float]:
    """Return the seconds of y and dx with codes, with the decoded weight (decoding included), and with a bf16
    weight."""
    weight = torch.randn(num_out, num_in, device=device).bfloat16() / num_in**0.5
    x = torch.randn(tokens, num_in, device=device).bfloat16()
    gradient = torch.randn(tokens, num_out, device=device).bfloat16()
    codec = load_format(name).codec
    parts = codec.encode(weight)
    codes: Codes | None = codec.codes(parts)
    assert codes is not None

    def decoded() -> None:
        x @ codec.decode(parts, weight.shape, torch.bfloat16).t()
        gradient @ codec.decode(parts, weight.shape, torch.bfloat16)

    def direct() -> None:
        output(x, codes, None)
        input_gradient(gradient, codes)

    def whole() -> None:
        x @ weight.t()
        gradient @ weight

    turns = [[seconds(work, device) for work in (direct, decoded, whole)] for _ in range(passes + 1)]
    return [min(found) for found in zip(*turns[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    print("format         tokens    out     in       y  y, outlier      dx  / decoded  / bf16")
    for name in BASE_FORMATS:
        if not load_format(name).supports_8bit_matmul:
            continue
        is_small = name == "fp8" and device.type == "cpu"
        for num_out, num_in in ((SMALL_SIDE, SMALL_SIDE),) if is_small else SHAPES:
            tokens = SMALL_TOKENS if is_small else args.tokens
            found = "".join(
                f"{share:{width}.2%}"
                for share, width in zip(errors(name, tokens, num_out, num_in, device), (8, 12, 8), strict=True)
            )
            direct, decoded, whole = times(name, tokens, num_out, num_in, device, args.passes)
            ratios = f"{direct / decoded:11.2f}{direct / whole:8.2f}"
            print(f"{name:14}{tokens:7}{num_out:7}{num_in:7}{found}{ratios}", flush=True)


if __name__ == "__main__":
    main()
