"""Time one full-size denoiser block with a LoRA, forward and backward: compiled (--compile) against eager.

    python benchmarks/compile.py
    python benchmarks/compile.py --tokens 1024 --precision bf16 --blocks flux_single

Weights are random. Both variants take turns in one run, and the fastest of several passes counts.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from library.architectures.flux.model import FluxConfig, make_modulation, positions  # noqa: E402
from library.architectures.sd3.model import JointBlock, MMDiTConfig  # noqa: E402
from library.memory.compiled import CompiledBlock, CompileSettings  # noqa: E402
from library.models.double_stream import DoubleStreamBlock, SingleStreamBlock  # noqa: E402
from library.models.rotary import Rotary  # noqa: E402
from networks.core.changes.adapter import Adapter  # noqa: E402
from networks.core.changes.alpha import ScaledDelta  # noqa: E402
from networks.core.changes.low_rank import LowRank  # noqa: E402
from networks.core.targets.targets import TargetModule  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLUX = FluxConfig(64, 3072, 128, 12288, 4096, 19, 38, True, pooled_width=768)
MODULATION = partial(make_modulation, FLUX)
SD3 = MMDiTConfig(1536, 24, 64, 6144, 2, 16, 4096, 2048, 192, False, frozenset())
NUM_TEXT = 77

Built = tuple[nn.Module, tuple[Any, ...]]


def random_tokens(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, count, width, dtype=dtype).requires_grad_()


def flux_double(num_tokens: int, dtype: torch.dtype) -> Built:
    side = int(num_tokens**0.5)
    rope = Rotary(FLUX.rope_axes)(positions(NUM_TEXT, [(side, side)], torch.device("cpu")), (1, side, side))
    vec = torch.randn(1, 3072, dtype=dtype)
    inputs = (random_tokens(side**2, 3072, dtype), random_tokens(NUM_TEXT, 3072, dtype), vec, rope, None)
    return DoubleStreamBlock(FLUX, MODULATION), inputs


def flux_single(num_tokens: int, dtype: torch.dtype) -> Built:
    side = int(num_tokens**0.5)
    rope = Rotary(FLUX.rope_axes)(positions(NUM_TEXT, [(side, side)], torch.device("cpu")), (1, side, side))
    x = random_tokens(side**2 + NUM_TEXT, 3072, dtype)
    return SingleStreamBlock(FLUX, MODULATION), (x, torch.randn(1, 3072, dtype=dtype), rope, None)


def sd3(num_tokens: int, dtype: torch.dtype) -> Built:
    block = JointBlock(SD3, is_last=False, has_dual_attention=False)
    c = torch.randn(1, 1536, dtype=dtype)
    return block, (random_tokens(2 * NUM_TEXT, 1536, dtype), random_tokens(num_tokens, 1536, dtype), c)


class SdxlBlock(nn.Module):
    """diffusers' transformer block of the U-Net's lowest level, called with positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.block = BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048)

    def forward(self, x_BTM: Tensor, text_BTW: Tensor) -> Tensor:
        y: Tensor = self.block(x_BTM, encoder_hidden_states=text_BTW)
        return y


def sdxl(num_tokens: int, dtype: torch.dtype) -> Built:
    return SdxlBlock(), (random_tokens(num_tokens, 1280, dtype), torch.randn(1, 77, 2048, dtype=dtype))


BLOCKS: Mapping[str, Callable[[int, torch.dtype], Built]] = {
    "flux_double": flux_double, "flux_single": flux_single, "sd3": sd3, "sdxl": sdxl,
}  # fmt: skip


def adapt(block: nn.Module, rank: int) -> list[nn.Parameter]:
    """Install a LoRA on every linear layer and return the trained parameters."""
    block.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear):
            change = ScaledDelta(layer, LowRank(layer, rank), rank)
            Adapter(TargetModule(name, name, layer, "plain"), change, 1.0).install()
            trained += list(change.parameters())
    return trained


def seconds(run: Callable[..., Any], inputs: tuple[Any, ...], dtype: torch.dtype, trained: list[nn.Parameter]) -> float:
    """Return the seconds of one forward and backward pass."""
    began = time.perf_counter()
    with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
        outputs = [y for y in tree_leaves(run(*inputs)) if isinstance(y, Tensor)]
    sum(y.float().square().mean() for y in outputs).backward()  # type: ignore[union-attr]
    took = time.perf_counter() - began
    for parameter in trained:
        parameter.grad = None
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = DTYPES[args.precision]
    for name in args.blocks:
        block, inputs = BLOCKS[name](args.tokens, dtype)
        trained = adapt(block.to(dtype), args.rank)
        compiled = CompiledBlock(block, CompileSettings(is_dynamic=False), set())
        began = time.perf_counter()
        seconds(compiled, inputs, dtype, trained)
        first = time.perf_counter() - began
        pairs = [[seconds(run, inputs, dtype, trained) for run in (block, compiled)] for _ in range(args.passes)]
        plain, fast = (min(times) for times in zip(*pairs, strict=True))
        print(f"{name}: {plain:.2f} s, compiled {fast:.2f} s ({fast / plain:.2f}); the first pass took {first:.0f} s")


if __name__ == "__main__":
    main()
