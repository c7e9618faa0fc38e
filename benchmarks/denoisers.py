"""Compare our own denoisers with diffusers' modules of the same weights: eager forward and backward pass on the CPU.
Qwen-Image's VAE is compared on one image too, without and with the layers of --qwen_image_vae_2d, without gradients.

The models have full width and one block of each kind. The weights are random and frozen; the gradients of latents and
text are computed. Both implementations take turns in one run, and the fastest pass of each counts. Memory is the peak
of the tensors' storage in addition to weights and inputs. Both ratios are ours to theirs. With --compile, the last line
of a model is the time of ours with compiled blocks, and its ratio to ours without.

    python -m benchmarks denoisers
    python -m benchmarks denoisers --models flux --precision bf16 --tokens 1024 --compile --profile
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_models import FLUX
from benchmarks.runner import measurement
from library.architectures.anima.llm_adapter import AdapterConfig
from library.architectures.anima.model import Anima, AnimaConfig
from library.architectures.anima.reference import diffusers_models
from library.architectures.flux.approximator import ApproximatorConfig
from library.architectures.flux.model import Flux
from library.architectures.flux_2.model import Flux2
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig
from library.architectures.krea2.model import SingleStreamDiT
from library.architectures.lumina.model import LuminaConfig, NextDiT
from library.architectures.qwen_image_21.model import QwenImage21
from library.architectures.sd3.model import MMDiT, MMDiTConfig
from library.architectures.zimage.model import ZImage
from library.base.command_parser import make_parser
from library.memory.blocks import plain, run_blocks_with
from library.memory.compiled import Compiled, CompileSettings
from library.memory.devices import move_to_device
from library.memory.planner.counter import OperationCounter
from library.models.vae.qwen_image import qwen_image_latents, statistics
from library.models.vae.qwen_image_2d import replace_layers_for_images
from tests.tiny import anima, chroma, flux, flux_2, hunyuan_image, krea2, lumina, qwen_image_21, sd3, zimage

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
QWEN_IMAGE_VAE = {"base_dim": 96, "z_dim": 16, "temperal_downsample": [False, True, True]}
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


def make_pair(
    ours: Any, theirs: Any, oracle: Run, text_width: int, side: int, more: Sequence[Any] = (),
    oracle_more: Sequence[Any] | None = None, channels: int = 16, patch: int = 2, level: float = 0.5,
) -> Pair:  # fmt: skip
    """Return both models with common inputs: latents of `side` patches a side, a noise level, text and `more`."""
    dtype = next(ours.parameters()).dtype
    values = random_inputs((1, channels, patch * side, patch * side), (1, NUM_TEXT, text_width), dtype=dtype)
    levels = torch.tensor([level])
    others = more if oracle_more is None else oracle_more
    return Pair(
        lambda x, text: ours(x, levels, text, *more),
        lambda x, text: oracle(theirs, x, levels.to(dtype), text, *others),
        values,
        (ours, theirs),
    )


def flux_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Flux, FLUX, dtype)
    more = torch.randn(1, FLUX.pooled_width, dtype=dtype), torch.ones(1, dtype=dtype)
    return make_pair(ours, theirs_of("flux", ours, dtype), flux.oracle_output, FLUX.text_width, side, more)


def chroma_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Flux, CHROMA, dtype)
    theirs = theirs_of("flux", ours, dtype)
    return make_pair(ours, theirs, chroma.oracle_output, CHROMA.text_width, side, (None, torch.zeros(1)), ())


def sd3_pair(side: int, dtype: torch.dtype, config: MMDiTConfig = SD3) -> Pair:
    ours = ours_of(MMDiT, config, dtype)
    pooled = torch.randn(1, config.pooled_width, dtype=dtype)

    def run(model: Any, x: Tensor, levels: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return sd3.run_theirs(model, {"latents": x, "timesteps": levels, "context": text, "pooled": pooled})

    theirs = sd3.diffusers_mmdit(config, ours.state_dict()).to(dtype)
    return make_pair(ours, theirs, run, config.context_width, side, [pooled], level=500.0)


def anima_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Anima, ANIMA, dtype)
    transformer, conditioner = (cast(model, dtype) for model in diffusers_models(ours))
    ids, mask = torch.randint(32128, (1, NUM_TEXT)), torch.ones(1, NUM_TEXT)

    def run(model: Any, *values: Tensor) -> Tensor:
        x, levels, source, source_mask, ids, mask = values
        return anima.oracle_of(model, conditioner)(x, levels, source, source_mask, ids, mask)

    return make_pair(ours, transformer, run, ANIMA.adapter.source_width, side, (mask, ids, mask.long()))


def hunyuan_image_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(HunyuanImage, HUNYUAN_IMAGE, dtype)
    names = ("latents", "timesteps", "text", "text_mask", "glyphs", "glyph_mask")
    masks = [torch.ones(1, length, dtype=torch.long) for length in (NUM_TEXT, 32)]
    more = masks[0], torch.randn(1, 32, HUNYUAN_IMAGE.glyph_width, dtype=dtype), masks[1]

    def run(model: Any, *values: Tensor) -> Tensor:
        return hunyuan_image.oracle_output(model, dict(zip(names, values, strict=True)))

    theirs, width = theirs_of("hunyuan_image", ours, dtype), HUNYUAN_IMAGE.text_width
    return make_pair(ours, theirs, run, width, side, more, channels=64, patch=1, level=500.0)


def flux_2_pair(side: int, dtype: torch.dtype) -> Pair:
    ours = ours_of(Flux2, FLUX_2, dtype)
    theirs, channels = theirs_of("flux_2", ours, dtype), FLUX_2.in_features
    guidance = [torch.tensor([1.0])]
    return make_pair(
        ours, theirs, flux_2.oracle_output, FLUX_2.text_width, side, (), guidance, channels=channels, patch=1
    )


def masked_pair(
    name: str, kind: Callable[[Any], nn.Module], config: Any, oracle: Run, text_width: int, side: int,
    dtype: torch.dtype, channels: int = 16, patch: int = 2,
) -> Pair:  # fmt: skip
    """Return a model that takes the mask of the text after it."""
    ours, mask = ours_of(kind, config, dtype), torch.ones(1, NUM_TEXT, dtype=torch.long)
    theirs = theirs_of(name, ours, dtype)
    return make_pair(ours, theirs, oracle, text_width, side, [mask], channels=channels, patch=patch)


def vae_pair(encodes: bool, is_2d: bool, side: int, dtype: torch.dtype) -> Pair:
    """Return Qwen-Image's VAE on an image, and as diffusers runs it on a video of one frame; nothing is trained."""
    from diffusers import AutoencoderKLQwenImage

    theirs = AutoencoderKLQwenImage(**QWEN_IMAGE_VAE).to(dtype).eval().requires_grad_(False)
    ours = replace_layers_for_images(deepcopy(theirs)) if is_2d else theirs
    codec, (mean, std) = qwen_image_latents("_anima.npz"), statistics(None, torch.device("cpu"))
    if encodes:
        return Pair(
            lambda x: codec.encode(ours, x, []),
            lambda x: (theirs.encode(x[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std,
            [torch.rand(1, 3, 16 * side, 16 * side, dtype=dtype) * 2 - 1],
            (ours, theirs),
        )
    return Pair(
        lambda z: codec.decode(ours, z),
        lambda z: theirs.decode((z * std + mean)[:, :, None]).sample[:, :, 0],
        [torch.randn(1, 16, 2 * side, 2 * side, dtype=dtype)],
        (ours, theirs),
    )


PAIRS: Mapping[str, Callable[[int, torch.dtype], Pair]] = {
    "flux": flux_pair,
    "chroma": chroma_pair,
    "sd3": sd3_pair,
    "sd3.5": partial(sd3_pair, config=SD35),
    "lumina": partial(masked_pair, "lumina", NextDiT, LUMINA, lumina.oracle_output, LUMINA.text_width),
    "anima": anima_pair,
    "hunyuan_image": hunyuan_image_pair,
    "flux_2": flux_2_pair,
    "krea2": partial(
        masked_pair, "krea2", SingleStreamDiT, KREA2, krea2.oracle_output, KREA2.num_states * KREA2.fusion.width
    ),
    "qwen_image_21": partial(
        masked_pair, "qwen_image_21", QwenImage21, QWEN_IMAGE_21, qwen_image_21.oracle_output,
        QWEN_IMAGE_21.text_width, channels=QWEN_IMAGE_21.in_features, patch=1,
    ),
    "zimage": partial(masked_pair, "zimage", ZImage, ZIMAGE, zimage.oracle_output, ZIMAGE.text_width),
    "VAE, encode": partial(vae_pair, True, False),
    "VAE, decode": partial(vae_pair, False, False),
    "2d VAE, encode": partial(vae_pair, True, True),
    "2d VAE, decode": partial(vae_pair, False, True),
}  # fmt: skip


def compile_ours(pair: Pair) -> Run:
    """Return our implementation with compiled blocks."""
    compiled = Compiled(plain, CompileSettings(is_dynamic=False))

    def run(*values: Tensor) -> Tensor:
        run_blocks_with(pair.modules[0], compiled)
        output = pair.ours(*values)
        run_blocks_with(pair.modules[0], plain)
        return output

    return run


def step(run: Run, values: Values, with_autocast: bool) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of inputs that require them."""
    if not any(value.requires_grad for value in values):
        with torch.no_grad():
            return (run(*values),)
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


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="also time ours with compiled blocks")
    parser.add_argument("--profile", action="store_true", help="print a profile of both")
    return parser


def compare(args: argparse.Namespace) -> None:
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
        if args.compile and pair.values[0].requires_grad:
            run = compile_ours(pair)
            first = seconds(lambda: step(run, pair.values, with_autocast))  # noqa: B023
            took = min(seconds(lambda: step(run, pair.values, with_autocast)) for _ in range(args.passes))  # noqa: B023
            print(f"  compiled {took:.2f} s ({took / ours:.2f}); the first pass took {first:.0f} s", flush=True)
        for run in runs if args.profile else ():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                step(run, pair.values, with_autocast)
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


main = measurement(setup_parser, compare)
