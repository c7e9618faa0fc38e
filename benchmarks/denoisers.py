"""Compare our own denoisers with diffusers' modules of the same weights: eager forward and backward pass on the CPU.

The models have full width and one block of each kind. The weights are random and frozen; the gradients of latents and
text are computed. Both implementations take turns in one run, and the fastest pass of each counts. Memory is the peak
of the tensors' storage in addition to weights and inputs. Both ratios are ours to theirs.

    python benchmarks/denoisers.py
    python benchmarks/denoisers.py --models flux --precision bf16 --tokens 1024 --profile
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.reading_in_a_format import CONFIG as FLUX  # noqa: E402
from library.architectures.anima.llm_adapter import AdapterConfig  # noqa: E402
from library.architectures.anima.model import Anima, AnimaConfig  # noqa: E402
from library.architectures.anima.reference import diffusers_models  # noqa: E402
from library.architectures.flux.approximator import ApproximatorConfig  # noqa: E402
from library.architectures.flux.model import Flux  # noqa: E402
from library.architectures.flux_2.model import Flux2  # noqa: E402
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig  # noqa: E402
from library.architectures.krea2.model import SingleStreamDiT  # noqa: E402
from library.architectures.lumina.model import LuminaConfig, NextDiT  # noqa: E402
from library.architectures.qwen_image_21.model import QwenImage21  # noqa: E402
from library.architectures.sd3.model import MMDiT, MMDiTConfig  # noqa: E402
from library.architectures.zimage.model import ZImage  # noqa: E402
from library.memory.devices import move_to_device  # noqa: E402
from library.memory.planner.counter import OperationCounter  # noqa: E402
from tests.tiny import (  # noqa: E402
    anima,
    chroma,
    flux,
    flux_2,
    hunyuan_image,
    krea2,
    lumina,
    qwen_image_21,
    sd3,
    zimage,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NUM_TEXT = 128

CHROMA = replace(FLUX, pooled_width=0, approximator=ApproximatorConfig(64, 5120, 5))
SD3 = MMDiTConfig(1536, 2, 64, 6144, 2, 16, 4096, 2048, 192, False, frozenset())
SD35 = replace(SD3, width=2432, mlp_width=9728, norms_queries=True)
LUMINA = LuminaConfig(64, 2304, 96, 8, 9216, 2304, 1024, 1024, 1, 1, 1)
ANIMA = AnimaConfig(16, 2048, 128, 8192, 1024, 256, 2, AdapterConfig(32128, 1024, 1024, 64, 4096, 1))
FLUX_2 = replace(flux_2.KLEIN_4B, num_double=1, num_single=1)
KREA2 = replace(krea2.FULL_SIZE, num_layerwise=1, num_refiners=1, num_blocks=1)
QWEN_IMAGE_21 = replace(qwen_image_21.FULL_SIZE, num_blocks=1)
ZIMAGE = replace(zimage.FULL_SIZE, num_context_refiners=1, num_noise_refiners=1, num_layers=1)
HUNYUAN_IMAGE = HunyuanImageConfig(64, 3584, 128, 14336, 3584, 1, 1, False, 1472, 2048, 1, 14336)

Run = Callable[..., Tensor]
Values = list[Tensor]


@dataclass(frozen=True)
class Pair:
    """One model in our and diffusers' implementation, with their common inputs: latents, then text."""

    ours: Run
    theirs: Run
    values: Values
    modules: tuple[nn.Module, nn.Module]


def fill_randomly(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fill a model on the meta device with random weights."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None:
                    scale = max(1, old[0].numel()) ** -0.5 if old.ndim > 1 else 0.1
                    value = scale * torch.randn(old.shape) + (old.ndim == 1 and name in ("weight", "scale"))
                    held[name] = nn.Parameter(value.to(dtype)) if isinstance(old, nn.Parameter) else value.to(dtype)
    return model.requires_grad_(False).eval()


def ours_of(kind: Callable[[Any], nn.Module], config: Any, dtype: torch.dtype) -> Any:
    """Return our model with random weights, laid out in memory as in training."""
    with torch.device("meta"):
        model = kind(config)
    return move_to_device(fill_randomly(model, dtype), torch.device("cpu"))


def theirs_of(name: str, ours: nn.Module, dtype: torch.dtype) -> Any:
    """Return diffusers' model with our weights."""
    return cast(import_module(f"library.architectures.{name}.reference").diffusers_model(ours), dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the parameters; buffers that the model computes itself stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def random_inputs(*shapes: tuple[int, ...], dtype: torch.dtype) -> Values:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def flux_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Flux, FLUX, dtype)
    theirs = theirs_of("flux", ours, dtype)
    values = random_inputs((1, 16, 2 * side, 2 * side), (1, NUM_TEXT, FLUX.text_width), dtype=dtype)
    sigmas, pooled, guidance = torch.tensor([0.5]), torch.randn(1, FLUX.pooled_width, dtype=dtype), torch.tensor([1.0])
    return Pair(
        lambda x, text: ours(x, sigmas, text, pooled, guidance),
        lambda x, text: flux.oracle_output(theirs, x, sigmas.to(dtype), text, pooled, guidance.to(dtype)),
        values,
        (ours, theirs),
    )


def chroma_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Flux, CHROMA, dtype)
    theirs = theirs_of("flux", ours, dtype)
    values = random_inputs((1, 16, 2 * side, 2 * side), (1, NUM_TEXT, CHROMA.text_width), dtype=dtype)
    sigmas = torch.tensor([0.5])
    return Pair(
        lambda x, text: ours(x, sigmas, text, None, torch.zeros_like(sigmas)),
        lambda x, text: chroma.oracle_output(theirs, x, sigmas.to(dtype), text),
        values,
        (ours, theirs),
    )


def sd3_pair(side: int, dtype: torch.dtype, config: MMDiTConfig = SD3) -> Pair:
    ours = ours_of(MMDiT, config, dtype)
    theirs = sd3.diffusers_mmdit(config, ours.state_dict()).to(dtype)
    values = random_inputs((1, 16, 2 * side, 2 * side), (1, NUM_TEXT, config.context_width), dtype=dtype)
    more = {"timesteps": torch.tensor([500.0]), "pooled": torch.randn(1, config.pooled_width, dtype=dtype)}
    return Pair(
        lambda x, text: sd3.run_ours(ours, {"latents": x, "context": text, **more}),
        lambda x, text: sd3.run_theirs(theirs, {"latents": x, "context": text, **more}),
        values,
        (ours, theirs),
    )


def lumina_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(NextDiT, LUMINA, dtype)
    theirs = theirs_of("lumina", ours, dtype)
    values = random_inputs((1, 16, 2 * side, 2 * side), (1, NUM_TEXT, LUMINA.text_width), dtype=dtype)
    times, mask = torch.tensor([0.5]), torch.ones(1, NUM_TEXT, dtype=torch.long)
    return Pair(
        lambda x, text: ours(x, times, text, mask),
        lambda x, text: lumina.oracle_output(theirs, x, times.to(dtype), text, mask),
        values,
        (ours, theirs),
    )


def anima_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Anima, ANIMA, dtype)
    transformer, conditioner = (cast(model, dtype) for model in diffusers_models(ours))
    values = random_inputs((1, 16, 2 * side, 2 * side), (1, NUM_TEXT, ANIMA.adapter.source_width), dtype=dtype)
    sigmas, ids, mask = torch.tensor([0.5]), torch.randint(32128, (1, NUM_TEXT)), torch.ones(1, NUM_TEXT)
    run = anima.oracle_of(transformer, conditioner)
    return Pair(
        lambda x, source: ours(x, sigmas, source, mask, ids, mask.long()),
        lambda x, source: run(x, sigmas.to(dtype), source, mask, ids, mask.long()),
        values,
        (ours, transformer),
    )


def hunyuan_image_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(HunyuanImage, HUNYUAN_IMAGE, dtype)
    theirs = theirs_of("hunyuan_image", ours, dtype)
    values = random_inputs((1, 64, side, side), (1, NUM_TEXT, HUNYUAN_IMAGE.text_width), dtype=dtype)
    more = {
        "text_mask": torch.ones(1, NUM_TEXT, dtype=torch.long),
        "glyphs": torch.randn(1, 32, HUNYUAN_IMAGE.glyph_width, dtype=dtype),
        "glyph_mask": torch.ones(1, 32, dtype=torch.long),
    }
    times = torch.tensor([500.0])
    return Pair(
        lambda x, text: ours(x, times, text, *more.values()),
        lambda x, text: hunyuan_image.oracle_output(theirs, {"latents": x, "timesteps": times, "text": text, **more}),
        values,
        (ours, theirs),
    )


def flux_2_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Flux2, FLUX_2, dtype)
    theirs = theirs_of("flux_2", ours, dtype)
    values = random_inputs((1, FLUX_2.in_features, side, side), (1, NUM_TEXT, FLUX_2.text_width), dtype=dtype)
    sigmas, guidance = torch.tensor([0.5]), torch.tensor([1.0])
    return Pair(
        lambda x, text: ours(x, sigmas, text),
        lambda x, text: flux_2.oracle_output(theirs, x, sigmas.to(dtype), text, guidance),
        values,
        (ours, theirs),
    )


def krea2_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(SingleStreamDiT, KREA2, dtype)
    theirs = theirs_of("krea2", ours, dtype)
    values = random_inputs(
        (1, 16, 2 * side, 2 * side), (1, NUM_TEXT, KREA2.num_states * KREA2.fusion.width), dtype=dtype
    )
    sigmas, mask = torch.tensor([0.5]), torch.ones(1, NUM_TEXT, dtype=torch.long)
    return Pair(
        lambda x, text: ours(x, sigmas, text, mask),
        lambda x, text: krea2.oracle_output(theirs, x, sigmas.to(dtype), text, mask),
        values,
        (ours, theirs),
    )


def qwen_image_21_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(QwenImage21, QWEN_IMAGE_21, dtype)
    theirs = theirs_of("qwen_image_21", ours, dtype)
    values = random_inputs(
        (1, QWEN_IMAGE_21.in_features, side, side), (1, NUM_TEXT, QWEN_IMAGE_21.text_width), dtype=dtype
    )
    sigmas, mask = torch.tensor([0.5]), torch.ones(1, NUM_TEXT, dtype=torch.long)
    return Pair(
        lambda x, text: ours(x, sigmas, text, mask),
        lambda x, text: qwen_image_21.oracle_output(theirs, x, sigmas.to(dtype), text, mask),
        values,
        (ours, theirs),
    )


def zimage_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(ZImage, ZIMAGE, dtype)
    theirs = theirs_of("zimage", ours, dtype)
    values = random_inputs((1, 16, 2 * side, 2 * side), (1, NUM_TEXT, ZIMAGE.text_width), dtype=dtype)
    times, mask = torch.tensor([0.5]), torch.ones(1, NUM_TEXT, dtype=torch.long)
    return Pair(
        lambda x, text: ours(x, times, text, mask),
        lambda x, text: zimage.oracle_output(theirs, x, times.to(dtype), text, mask),
        values,
        (ours, theirs),
    )


PAIRS: Mapping[str, Callable[[int, torch.dtype], Pair]] = {
    "flux": flux_pair,
    "chroma": chroma_pair,
    "sd3": sd3_pair,
    "sd3.5": lambda side, dtype: sd3_pair(side, dtype, SD35),
    "lumina": lumina_pair,
    "anima": anima_pair,
    "hunyuan_image": hunyuan_image_pair,
    "flux_2": flux_2_pair,
    "krea2": krea2_pair,
    "qwen_image_21": qwen_image_21_pair,
    "zimage": zimage_pair,
}


def step(run: Run, values: Values, with_autocast: bool) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of the inputs."""
    with torch.autocast("cpu", torch.bfloat16, enabled=with_autocast):
        output = run(*values)
    return output.detach(), *torch.autograd.grad(output.float().square().mean(), values)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_bytes(pair: Pair, run: Run, with_autocast: bool) -> int:
    """Return the peak memory of a step, without weights and inputs."""
    counter = OperationCounter()
    tensors = [t for module in pair.modules for t in (*module.parameters(), *module.buffers())]
    counter.leave_out([*tensors, *pair.values])
    with counter:
        step(run, pair.values, with_autocast)
    return counter.peak


def difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Return the largest relative error of any tensor, by norm.

    Outputs in different layouts (patches or an image) are compared by their norms.
    """
    pairs = zip(ours, theirs, strict=True)
    return max(
        float((a.float() - b.float()).norm() / b.float().norm())
        if a.shape == b.shape
        else abs(float(a.float().norm() / b.float().norm()) - 1)
        for a, b in pairs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--profile", action="store_true", help="print a profile of both")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype, with_autocast = DTYPES[args.precision], args.precision == "bf16"
    print("model             ours s  theirs s  ratio  ours MiB  theirs  ratio   off by")
    for name in args.models:
        pair = PAIRS[name](int(args.tokens**0.5), dtype)
        runs = (pair.ours, pair.theirs)
        off = difference(*(step(run, pair.values, with_autocast) for run in runs))
        turns = [[seconds(lambda: step(run, pair.values, with_autocast)) for run in runs] for _ in range(args.passes)]  # noqa: B023
        ours, theirs = (min(times) for times in zip(*turns, strict=True))
        sizes = [peak_bytes(pair, run, with_autocast) / 2**20 for run in runs]
        memory = f"{sizes[0]:10.0f}{sizes[1]:8.0f}{sizes[0] / sizes[1]:7.2f}"
        print(f"{name:15}{ours:9.2f}{theirs:10.2f}{ours / theirs:7.2f}{memory}{off:9.0e}", flush=True)
        for run in runs if args.profile else ():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                step(run, pair.values, with_autocast)
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


if __name__ == "__main__":
    main()
