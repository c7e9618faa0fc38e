"""Measure the cost of the trainer in addition to the mathematics it does, as ratios within one run.

The baseline is a minimal PyTorch loop that does the same mathematics plainly: text encoder on every step, adapters as
three separate operations, torch's default AdamW, contiguous tensors. Both loops train on the same weights and images
and take turns, so that a busy machine slows both alike. Start-up time and peak memory are those of the real script in a
separate process.

    python benchmarks/trainer_tax.py --model tiny
    python benchmarks/trainer_tax.py --model sd15 --side 512 --precision bf16 --steps 3 --rounds 3
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import mse_loss  # noqa: E402


def build_model(folder: Path, size: str) -> None:
    """Write a random SD 1.x model as a diffusers folder: tiny, or in the size of SD 1.5 in fp16."""
    from tests.tiny.sd import build_tiny_sd

    build_tiny_sd(folder, seed=7)
    if size == "tiny":
        return
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"]
    text = CLIPTextConfig(
        vocab_size=tokens, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    levels = (320, 640, 1280, 1280)
    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel(block_out_channels=levels, cross_attention_dim=768, attention_head_dim=8),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(text),
        }
    generator = torch.Generator().manual_seed(11)
    for name, model in models.items():
        model.to_empty(device="cpu")
        for path, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                is_norm = tensor.dim() == 1 and path.endswith("weight")
                scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.0
                tensor.normal_(generator=generator).mul_(scale).add_(1.0 if is_norm else 0.0)
        model.half().save_pretrained(folder / name)


def build_images(folder: Path, side: int, count: int) -> None:
    """Write smooth random images with captions."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"picture number {i}")


def arguments_of(folder: Path, args: argparse.Namespace, steps: int) -> list[str]:
    """Return the command line of the real script."""
    given = [
        "--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir", str(folder / "pictures"),
        "--caption_extension", ".txt", "--resolution", str(args.side), "--train_batch_size", str(args.batch_size),
        "--output_dir", str(folder / "out"), "--network_module", "networks.lora", "--network_dim", "16",
        "--network_alpha", "16", "--optimizer_type", "AdamW", "--learning_rate", "1e-4", "--seed", "1",
        "--mixed_precision", args.precision, "--max_train_steps", str(steps), "--cache_latents",
        "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    return given if args.text_encoder else [*given, "--network_train_unet_only"]


class Multiplexer:
    """A scheduler of two training loops that take turns; each is a generator that yields the seconds of a step."""

    def __init__(self, loops: dict[str, Iterator[float]]) -> None:
        self._loops = loops

    def seconds(self, steps: int, rounds: int) -> dict[str, float]:
        """Return the median seconds of a step of each loop, after one warm-up turn each."""
        found: dict[str, list[float]] = {name: [] for name in self._loops}
        for turn in range(rounds + 1):
            for name, loop in self._loops.items():
                times = [next(loop) for _ in range(steps)]
                if turn:
                    found[name] += times
        return {name: statistics.median(times) for name, times in found.items()}


class Turnstile:
    """A stand-in for the interruption check, which the loop makes once per step: records the time and waits for its
    turn."""

    def __init__(self) -> None:
        self._may_go = threading.Semaphore(0)
        self._has_stepped = threading.Semaphore(0)
        self._started = 0.0
        self._seconds = 0.0

    @property
    def is_requested(self) -> bool:
        self._seconds = time.perf_counter() - self._started
        self._has_stepped.release()
        self._may_go.acquire()
        self._started = time.perf_counter()
        return False

    def steps(self) -> Iterator[float]:
        """Yield the seconds of each step; the loop runs only while the caller waits for the next one."""
        while True:
            self._has_stepped.acquire()
            yield self._seconds
            self._may_go.release()


def our_steps(folder: Path, args: argparse.Namespace) -> Iterator[float]:
    """Yield the seconds of each step of the real loop."""
    import train_network
    from library.architectures.sd.assembly import build
    from library.options.train import TrainOptions
    from library.processes import from_accelerator
    from library.training.command_line.cli import parse
    from library.training.loop import loop
    from library.training.models import opening
    from library.training.reporting.event_stream import Events
    from library.training.run import runs
    from library.training.run.prepare import prepare

    options = TrainOptions.from_args(parse(train_network.setup_parser(), arguments_of(folder, args, 10**6)))
    arch = build(options)
    accelerator = opening.open_accelerator(options.precision.mixed_precision, options.trackers)
    processes = from_accelerator(accelerator)
    plan = opening.open_data_plan(options, arch, 1, processes.count)
    wanted = runs.AdapterRequest(options, 1, None, Events())
    (prepared,) = prepare(options, arch, 1, plan, accelerator, processes, [wanted])
    turnstile: Any = Turnstile()
    threading.Thread(target=loop.train, args=([prepared], turnstile), daemon=True).start()
    yield from turnstile.steps()


class PlainLora(nn.Module):
    """LoRA as separate operations: base layer, down, up, scale, add."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(base.in_channels, rank, 1, bias=False)
            self.up: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)  # type: ignore[arg-type]
            self.up = nn.Linear(rank, base.out_features, bias=False)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 1.0


def adapted(blocks: list[nn.Module]) -> list[Tensor]:
    """Replace every linear layer and 1x1 convolution of the blocks by an adapter. Return the trained parameters."""
    parameters: list[Any] = []
    for parent in [module for block in blocks for module in block.modules()]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear or (type(child) is nn.Conv2d and child.kernel_size == (1, 1)):
                adapter = PlainLora(child, 16)
                setattr(parent, name, adapter)
                parameters += [adapter.down.weight, adapter.up.weight]
    return parameters


def plain_steps(folder: Path, args: argparse.Namespace) -> Iterator[float]:
    """Yield the seconds of each step of the minimal loop."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.precision]
    model = folder / "model"
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=dtype).requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=dtype).requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=dtype)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parameters = adapted([m for m in unet.modules() if type(m).__name__ == "Transformer2DModel"])
    if args.text_encoder:
        parameters += adapted([m for m in text_encoder.modules() if type(m).__name__ == "CLIPEncoderLayer"])
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)  # type: ignore[arg-type]
    paths = sorted((folder / "pictures" / "1_x").glob("*.png"))
    latents, captions = [], []
    with torch.no_grad():
        for path in paths:
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].to(dtype) / 127.5 - 1
            latents.append(vae.encode(pixels).latent_dist.sample().float() * 0.18215)
            captions.append(path.with_suffix(".txt").read_text())
    del vae
    while True:
        for first in range(0, len(paths), args.batch_size):
            started = time.perf_counter()
            clean = torch.cat(latents[first : first + args.batch_size])
            ids = tokenizer(
                captions[first : first + args.batch_size], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                with torch.set_grad_enabled(args.text_encoder):
                    hidden = text_encoder(ids)[0]
                noise = torch.randn_like(clean)
                timesteps = torch.randint(0, 1000, (len(clean),))
                prediction = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, hidden).sample
            loss = mse_loss(prediction.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            yield time.perf_counter() - started


def measure_process(command: list[str]) -> dict[str, float]:
    """Run a command. Return the seconds to its first step, its CPU seconds, and its peak resident memory in GB."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    assert process.stderr is not None
    first_step, text = float("nan"), b""
    while chunk := os.read(process.stderr.fileno(), 4096):
        text += chunk
        if first_step != first_step and re.search(rb"\b1/1 \[", text):
            first_step = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(text.decode(errors="replace")[-2000:])
    return {"first_step_s": first_step, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_gb": usage.ru_maxrss / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--side", type=int, default=64, help="side of the square images, in pixels; 512 for SD 1.5")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop")
    parser.add_argument("--text_encoder", action="store_true", help="both loops train the text encoder too")
    parser.add_argument("--plain_only", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain_only:
        steps = plain_steps(args.plain_only, args)
        next(steps)
        print("1/1 [", file=sys.stderr, flush=True)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder / "model", args.model)
        (folder / "pictures").mkdir()
        build_images(folder / "pictures" / "1_x", args.side, 8)
        command = [sys.executable, str(ROOT / "train_network.py"), *arguments_of(folder, args, 1)]
        plain = [sys.executable, __file__, "--plain_only", str(folder), "--model", args.model]
        plain += ["--precision", args.precision, "--batch_size", str(args.batch_size), "--side", str(args.side)]
        plain += ["--text_encoder"] if args.text_encoder else []
        report: dict[str, Any] = {"ours": measure_process(command), "plain": measure_process(plain)}
        loops = {"ours": our_steps(folder, args), "plain": plain_steps(folder, args)}
        seconds = Multiplexer(loops).seconds(args.steps, args.rounds)
    report["step_s"] = seconds
    report["step_ratio"] = seconds["ours"] / seconds["plain"]
    report["peak_ratio"] = report["ours"]["peak_gb"] / report["plain"]["peak_gb"]
    report["first_step_ratio"] = report["ours"]["first_step_s"] / report["plain"]["first_step_s"]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
