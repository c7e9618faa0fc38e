"""Measure Qwen-Image's VAE on an image in three ways: as in diffusers ("frames"), as here, without diffusers' cache for
a next frame ("picture"), and with --qwen_image_vae_2d ("2d").

Each way runs in a separate process on one thread, with the same random weights of full size. CPU seconds are the best
of `--rounds`, after a first pass that is not timed. Memory is the peak of the process above its level with the model
loaded. Both are also printed as ratios to the first way.

    python benchmarks/image_vae.py --side 384
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.models.vae.qwen_image import qwen_image_latents, statistics  # noqa: E402
from library.models.vae.qwen_image_2d import replace_layers_for_images  # noqa: E402

SIZES = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
WAYS = ("frames", "picture", "2d")
PAGE_MIB = 4096 / 2**20


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MIB


def peak_mib(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return the result of `work`, and the peak of the process's memory in MiB above its level before."""
    before, found, done = resident_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            found[0] = max(found[0], resident_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return result, found[0] - before


def best_seconds(work: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def whole_encode(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    """Encode as diffusers encodes a video of one frame."""
    mean, std = statistics(pixels_BCHW.device)
    latents_BCHW: Tensor = vae.encode(pixels_BCHW[:, :, None]).latent_dist.mode()[:, :, 0]
    return (latents_BCHW - mean) / std


def whole_decode(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Decode as diffusers decodes a video of one frame."""
    mean, std = statistics(latents_BCHW.device)
    pixels_BCHW: Tensor = vae.decode((latents_BCHW * std + mean)[:, :, None]).sample[:, :, 0]
    return pixels_BCHW


def measure(way: str, side: int, rounds: int) -> dict[str, Any]:
    """Return (CPU seconds, MiB, values) of encoding and decoding in one way."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = AutoencoderKLQwenImage(**SIZES).eval().requires_grad_(False)
    vae = replace_layers_for_images(vae) if way == "2d" else vae
    codec, pixels = qwen_image_latents("_anima.npz"), torch.rand(1, 3, side, side) * 2 - 1
    is_whole = way == "frames"
    with torch.no_grad():
        encode = (lambda: whole_encode(vae, pixels)) if is_whole else (lambda: codec.encode(vae, pixels, []))
        latents, encode_mib = peak_mib(encode)
        decode = (lambda: whole_decode(vae, latents)) if is_whole else (lambda: codec.decode(vae, latents))
        images, decode_mib = peak_mib(decode)
        return {
            "encode": (best_seconds(encode, rounds), encode_mib, latents.tolist()),
            "decode": (best_seconds(decode, rounds), decode_mib, images.tolist()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(measure(args.way, args.side, args.rounds)))
        return
    found = {}
    for way in WAYS:
        words = [sys.executable, __file__, "--side", str(args.side), "--rounds", str(args.rounds), "--way", way]
        found[way] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    print(f"{'':8}{'way':9}{'s':>8}{'MiB':>8}{'time':>7}{'memory':>8}{'off by':>10}")
    for part in ("encode", "decode"):
        base_seconds, base_mib, base_values = found["frames"][part]
        for way in WAYS:
            seconds, mib, values = found[way][part]
            off = (torch.tensor(values) - torch.tensor(base_values)).abs().max().item()
            ratios = f"{seconds / base_seconds:>7.2f}{mib / base_mib:>8.2f}"
            print(f"{part:8}{way:9}{seconds:>8.2f}{mib:>8.0f}{ratios}{off:>10.1e}")


if __name__ == "__main__":
    main()
