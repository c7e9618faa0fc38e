"""How far a Linear layer's output and the gradient of its input are off when its weight is stored in a form.

Against float64 with the exact weight; x, weight and gradient are normal. "outliers" is a weight in which one input of
every 500 is 30 times as large, as layers of trained models have them. Beside the errors: bytes a value takes, and the
time of decoding one FLUX.1 weight as a ratio to the product with 1024 tokens on this machine.

    python benchmarks/form_errors.py
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.memory.formats.format import Parts  # noqa: E402
from library.memory.formats.named import FORMS  # noqa: E402

OUT, IN, TOKENS = 3072, 3072, 1024  # a projection of FLUX.1's attention


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


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, IN, generator=generator)
    gradient = torch.randn(TOKENS, OUT, generator=generator)
    weight = torch.randn(OUT, IN, generator=generator) / IN**0.5
    spread = torch.ones(IN)
    spread[torch.randperm(IN, generator=generator)[: IN // 500]] = 30
    print(f"{'form':14}{'bytes':>7}{'y':>9}{'dx':>9}{'y, outliers':>13}{'dx, outliers':>14}{'decoding':>10}")
    product = seconds(lambda: x.bfloat16() @ weight.bfloat16().T)
    for name, form in FORMS.items():
        errors: list[float] = []
        for exact in (weight, weight * spread):
            parts = form.encode(exact.bfloat16())
            stored = form.decode(parts, exact.shape, torch.float32)
            errors.append(error(x @ stored.T, x.double() @ exact.double().T))
            errors.append(error(gradient @ stored, gradient.double() @ exact.double()))
        ratio = seconds(lambda: form.decode(parts, weight.shape, torch.bfloat16)) / product  # noqa: B023
        cells = "".join(f"{value:{width}.2%}" for value, width in zip(errors, (9, 9, 13, 14), strict=True))
        print(f"{name:14}{num_bytes(parts) / weight.numel():7.3f}{cells}{ratio:10.2f}")


if __name__ == "__main__":
    main()
