"""Measure the seconds of a training step on a GPU, its share of the GPU's peak, and memory: SD 1.5, SDXL, SD3 medium,
FLUX.1.

Each model runs eager, compiled, and with 8-bit matrix products, and next to these as a bare loop on diffusers and PEFT
with the same inputs, loss, optimizer and rank; with --memory, eager and in each memory mode. Weights have full size,
are random and made on the GPU, so nothing has to be downloaded. Images have 512 pixels a side for SD 1.5 and 1024 for
the others; the batch size is 3 for SD3 and 1 for the others. bf16, AdamW, LoRA of rank 16, no recomputation unless
requested. Each mode runs in a separate process, with at most `--budget` GB of the GPU's memory (torch's own share,
without the CUDA context); modes that do not fit are reported as such. TFLOP/s and MFU count the operations of the eager
step, or of the first mode, relative to the GPU's 16-bit peak. The last column is the time relative to the bare loop, or
to the first mode.

    python -m benchmarks gpu_step
    python -m benchmarks gpu_step --memory --models flux sdxl --budget 8
    python -m benchmarks gpu_step --models flux --modes eager bare --recompute
    python -m benchmarks gpu_step --device cpu --tiny      # smoke test; the figures mean nothing
    python -m benchmarks gpu_step --device cpu --models sd15 --modes eager bare --float32 --pixels 128

Our convolutions have the layout that runs give them: channels last, and on a CPU matrix products for few pixels.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.gpu_models import MEMORY_MODES, RUNNERS, Mode, Subject, build_randomly, flux, random_weight, sdxl
from benchmarks.runner import measurement
from library.base.command_parser import make_parser
from library.memory.blocks import run_blocks_with, stacks_of
from library.memory.compiled import Compiled, CompileSettings
from library.memory.devices import move_to_device
from library.memory.frozen import frozen_layers, multiply_codes
from library.memory.planner.counter import FlopCounter
from library.memory.planner.measured import measure_peak_flops
from library.training.models.block_running import cast_factors_of
from networks import lora
from networks.core.protocol import adopt

RANK, NUM_WARM, NUM_TIMED = 16, 3, 10
EAGER, BARE = Mode(runner="plain"), "bare"
IN_8_BITS = replace(EAGER, weight_format="int8_rotated", multiplies_codes=True)
STEP_MODES = {
    "eager": EAGER,
    "compiled": replace(EAGER, compiles=True),
    "8bit": IN_8_BITS,
    "8bit compiled": replace(IN_8_BITS, compiles=True),
}
MODES = {**STEP_MODES, **{str(mode): mode for mode in MEMORY_MODES}}

Step = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """diffusers' denoiser: how to build it, how to call it with our inputs, and which modules get adapters."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Any, Any], Tensor]
    adapted: tuple[str, ...]  # parts of the names of the adapted modules


def sd15(is_tiny: bool) -> Subject:
    from diffusers import UNet2DConditionModel

    tiny = sdxl(True)
    if is_tiny:
        return tiny

    def values() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.randn(1, 77, 768)), {}

    return replace(tiny, build=lambda: UNet2DConditionModel(cross_attention_dim=768), values=values)


def sd3(is_tiny: bool) -> Subject:
    from library.architectures.sd3.layers import view
    from library.architectures.sd3.model import MMDiT, MMDiTConfig
    from tests.tiny.sd3 import PLAIN

    config = PLAIN if is_tiny else MMDiTConfig(1536, 24, 64, 6144, 2, 16, 4096, 2048, 192, False, frozenset())
    batch, side, tokens = (1, 16, 9) if is_tiny else (3, 128, 154 + 256)

    def values() -> tuple[tuple[Any, ...], dict[str, Any]]:
        context, pooled = torch.randn(batch, tokens, config.context_width), torch.randn(batch, config.pooled_width)
        return (torch.randn(batch, 16, side, side), torch.full((batch,), 500.0), context, pooled), {}

    return Subject(lambda: MMDiT(config), values, lambda model: view([], model)[1], stacks_of, run_blocks_with)


def peer_of_unet(subject: Subject) -> Peer:
    return Peer(subject.build, lambda model, values, named: model(*values, **named).sample, ("attentions.",))


def peer_of_sd3(is_tiny: bool) -> Peer:
    from diffusers import SD3Transformer2DModel

    from tests.tiny.sd3 import run_theirs

    sizes: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    sizes |= {"sample_size": 128, "pos_embed_max_size": 192}
    if is_tiny:
        sizes = {"num_layers": 2, "num_attention_heads": 1, "caption_projection_dim": 64, "joint_attention_dim": 96}
        sizes |= {"pooled_projection_dim": 48, "sample_size": 16, "pos_embed_max_size": 24}

    def call(model: nn.Module, values: Any, named: Any) -> Tensor:
        return run_theirs(model, dict(zip(("latents", "timesteps", "context", "pooled"), values, strict=True)))

    return Peer(lambda: SD3Transformer2DModel(**sizes, out_channels=16), call, ("transformer_blocks.",))


def peer_of_flux(is_tiny: bool) -> Peer:
    from diffusers import FluxTransformer2DModel

    from tests.tiny.flux import oracle_output

    sizes: dict[str, Any] = {"guidance_embeds": True}
    if is_tiny:
        sizes |= {"num_layers": 4, "num_single_layers": 6, "num_attention_heads": 2, "attention_head_dim": 32}
        sizes |= {"joint_attention_dim": 32, "axes_dims_rope": (4, 14, 14)}

    def call(model: nn.Module, values: Any, named: Any) -> Tensor:
        return oracle_output(model, *values)

    return Peer(lambda: FluxTransformer2DModel(**sizes), call, ("transformer_blocks.",))


SUBJECTS: Mapping[str, tuple[Callable[[bool], Subject], Callable[[bool], Peer]]] = {
    "sd15": (sd15, lambda is_tiny: peer_of_unet(sd15(is_tiny))),
    "sdxl": (sdxl, lambda is_tiny: peer_of_unet(sdxl(is_tiny))),
    "sd3": (sd3, peer_of_sd3),
    "flux": (flux, peer_of_flux),
}


def step_of(run: Callable[[], Any], parameters: list[nn.Parameter], device: torch.device, casts: bool) -> Step:
    """Return a function that runs one step (forward, backward, optimizer) and returns the loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")

    def step(before_backward: Callable[[], None] = lambda: None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=casts):
            output = run()
        loss = getattr(output, "sample", output).float().square().mean()
        before_backward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def our_step(subject: Subject, mode: Mode, device: torch.device, casts: bool) -> tuple[Step, int]:
    """Return a step of our denoiser with our adapter, and the number of trained parameters."""
    model = build_randomly(subject, mode, device)
    if not casts:
        model.float()
    if not mode.share:
        move_to_device(model, device)
    if mode.multiplies_codes:
        multiply_codes(frozen_layers(model))
    runner = RUNNERS[mode.runner]()
    subject.run_blocks_with(model, Compiled(runner, CompileSettings()) if mode.compiles else runner)
    seen = subject.view(model)
    network = lora.create_network(1.0, RANK, RANK, None, [], seen)
    network.apply_to([], seen, False, True)
    network.to(device)
    cast_factors_of(adopt(network), subject.stacks(model))
    values, named = tree_map_only(Tensor, lambda tensor: tensor.to(device), subject.values())
    run = step_of(lambda: model(*values, **named), list(network.parameters()), device, casts)
    return run, sum(p.numel() for p in network.parameters())


def bare_step(subject: Subject, peer: Peer, recomputes: bool, device: torch.device, casts: bool) -> tuple[Step, int]:
    """Return a step of diffusers' denoiser with PEFT's adapter, and the number of trained parameters."""
    from accelerate import init_empty_weights
    from peft import LoraConfig, inject_adapter_in_model

    with init_empty_weights(include_buffers=False):
        model = peer.build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            scale = 1.0 if parameter.ndim > 1 else 0.02
            setattr(module, name, nn.Parameter(scale * random_weight(parameter, device)))
    model.to(device, None if casts else torch.float32).requires_grad_(False).train(
        recomputes
    )  # diffusers recomputes in train mode only
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and any(part in name for part in peer.adapted)
        and (isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1))
    ]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if recomputes:
        model.enable_gradient_checkpointing()
    values, named = tree_map_only(Tensor, lambda tensor: tensor.to(device), subject.values())
    run = step_of(lambda: peer.call(model, values, named), trained, device, casts)
    return run, sum(p.numel() for p in trained)


def with_images_of(pixels: int, subject: Subject) -> Subject:
    """Return the subject with square images of a size, 8 pixels to a latent."""

    def values() -> tuple[tuple[Any, ...], dict[str, Any]]:
        (latents_BCHW, *others), named = subject.values()
        return (torch.randn(*latents_BCHW.shape[:2], pixels // 8, pixels // 8), *others), named

    return replace(subject, values=values)


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return seconds, GiB (of tensors, taken) and trained parameters of a mode, and for "eager" and "8bit" a step's
    FLOPs."""
    (make_subject, make_peer), mode, recomputes = SUBJECTS[args.models[0]], args.modes[0], args.recompute
    subject = make_subject(args.tiny)
    if args.pixels:
        subject = with_images_of(args.pixels, subject)
    if mode == BARE:
        step, num_trained = bare_step(subject, make_peer(args.tiny), recomputes, device, not args.float32)
    else:
        wanted = replace(MODES[mode], runner="recompute") if recomputes else MODES[mode]
        step, num_trained = our_step(subject, wanted, device, not args.float32)
    is_gpu, flops = device.type == "cuda", 0
    assert step().isfinite(), "the loss of the random weights is not finite"
    if mode in ("eager", "8bit"):
        with FlopCounter() as counter:
            step(lambda: setattr(counter, "in_backward", True))
        flops = counter.flops
    for _ in range(NUM_WARM):
        step()
    if is_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(NUM_TIMED):
        step()
    if is_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / NUM_TIMED
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if is_gpu else (0, 0)
    figures = {"allocated": peaks[0] / 2**30, "reserved": peaks[1] / 2**30, "trained": num_trained, "flops": flops}
    return {"seconds": seconds, **figures}


def child(args: argparse.Namespace) -> None:
    """Measure one mode and print the result as JSON."""
    if args.budget is not None and args.device == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.budget * 1e9 / total))
    try:
        found = measure(args, torch.device(args.device))
    except torch.OutOfMemoryError:
        found = {}
    print(json.dumps(found))


def run_in_child(args: argparse.Namespace, model: str, mode: str) -> dict[str, float] | str:
    """Measure one mode in a separate process; return its figures, or the reason why there are none."""
    command = [sys.executable, "-m", "benchmarks", "gpu_step", "--child", "--models", model, "--modes", mode]
    command += (
        ["--device", args.device, *["--tiny"] * args.tiny]
        + ["--recompute"] * args.recompute
        + ["--float32"] * args.float32
    )
    command += ["--pixels", str(args.pixels)] if args.pixels else []
    command += [] if args.budget is None else ["--budget", str(args.budget)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds)
    except subprocess.TimeoutExpired:
        return f"not done within {args.seconds} s"
    if done.returncode:
        return f"fails: {done.stderr.strip().splitlines()[-1]}"
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found or "does not fit"


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--modes", nargs="+", choices=[*MODES, BARE], default=[*STEP_MODES, BARE])
    parser.add_argument("--memory", action="store_true", help="eager and in every memory mode, in place of --modes")
    parser.add_argument("--budget", type=float, help="GB of GPU memory; unset: all of it")
    parser.add_argument("--recompute", action="store_true", help="recompute all blocks, in ours and the bare loop")
    parser.add_argument("--float32", action="store_true", help="weights and computation in float32, not bf16")
    parser.add_argument("--pixels", type=int, help="side of the images; unset: as above")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of one mode")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few narrow blocks")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure_all(args: argparse.Namespace) -> None:
    if args.child:
        child(args)
        return
    device = torch.device(args.device)
    peak = measure_peak_flops(device, torch.bfloat16)
    gpu_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: these figures say nothing about a GPU"
    print(f"{gpu_name}, torch {torch.__version__}, peak {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'unknown'}")
    modes = ["eager", *map(str, MEMORY_MODES)] if args.memory else args.modes
    for model in args.models:
        print(f"{model:54} s/step  TFLOP/s    MFU tensors GiB taken GiB   trained  ratio")
        results = {mode: run_in_child(args, model, mode) for mode in modes}
        measured = {mode: found for mode, found in results.items() if not isinstance(found, str)}
        first = measured.get(BARE) or next(iter(measured.values()), None)
        flops = measured.get("eager", first or {}).get("flops", 0.0)
        for mode, found in results.items():
            if isinstance(found, str) or first is None:
                print(f"  {mode:52} {found}")
                continue
            rate = flops / found["seconds"]
            share = f"{rate / peak:7.1%}" if peak else f"{'':>7}"
            memory = f"{found['allocated']:12.2f}{found['reserved']:10.2f}{found['trained']:10.0f}"
            ratio = found["seconds"] / first["seconds"]
            print(f"  {mode:52}{found['seconds']:7.3f}{rate / 1e12:9.1f}{share}{memory}{ratio:7.2f}", flush=True)


main = measurement(setup_parser, measure_all)
