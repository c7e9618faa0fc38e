"""Measure the cost of caching latents in addition to the VAE's own time, and the cost of a later start that finds them.

The baseline encodes the same images, already decoded in memory, in the same batches. Both take turns; the VAE has one
thread and random weights. The best of `--rounds` counts, because a busy machine only ever adds time. With fewer than
256 images there is no index, and every start opens every entry.

    python benchmarks/latent_caching.py --side 256 --count 256
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Generator, Tensor  # noqa: E402

CHANNELS = {"tiny": (8, 8, 16, 16), "medium": (32, 64, 128, 128), "sd15": (128, 256, 512, 512)}


def build_vae(name: str) -> Any:
    """Return a VAE with Stable Diffusion's layout and random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=CHANNELS[name],
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )
    return vae.eval().requires_grad_(False)


def build_images(folder: Path, side: int, count: int) -> None:
    """Write JPEG files 1.5 times the training size, so that each is downscaled like a photograph."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((side * 3 // 2, side * 3 // 2), Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=92)


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall and CPU seconds of `work`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def forget(folder: Path) -> None:
    """Delete cached latents and their index."""
    for path in [*folder.glob("*.npz"), *folder.glob(".*")]:
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", choices=list(CHANNELS), default="medium")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--vae_batch_size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=8, help="--max_data_loader_n_workers, threads that read images")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    from library.architectures.sd.assembly import LATENT_SCALE, LATENTS
    from library.data.caching.latent_jobs import plan_jobs
    from library.data.caching.latents import cache_latents, decode
    from library.data.decoding.tensors import to_pixels
    from library.data.plan.data_plan import DataPlan, build_plan
    from library.data.sources.folders.image_index import SETTLED_NS
    from library.models.vae.latents import KlLatents
    from library.options.train import TrainOptions

    codec, vae = KlLatents(LATENTS, LATENT_SCALE), build_vae(args.vae)

    def encode(pixels_BCHW: Tensor, generators: Sequence[Generator]) -> Tensor:
        with torch.no_grad():
            return codec.encode(vae, pixels_BCHW, generators)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "1_x"
        build_images(folder, args.side, args.count)

        def opened(flag: str) -> tuple[DataPlan, TrainOptions]:
            options = argparse.ArgumentParser()
            TrainOptions.add_to(options)
            given = ["--train_data_dir", temporary, "--resolution", str(args.side), flag]
            given += ["--vae_batch_size", str(args.vae_batch_size), "--max_data_loader_n_workers", str(args.workers)]
            chosen = TrainOptions.from_args(options.parse_args(given))
            return build_plan(chosen, codec.spec, 1, None, None), chosen

        def caching(flag: str) -> tuple[float, float]:
            plan, options = opened(flag)
            return seconds_of(lambda: cache_latents(plan, encode, lambda: "a vae", options.caching, 1))

        plan, _ = opened("--cache_latents")
        images = [to_pixels(decode(job, plan.storage).image) for job in plan_jobs(plan, False)]
        batches = [torch.stack(images[i : i + args.vae_batch_size]) for i in range(0, len(images), args.vae_batch_size)]
        generators = [Generator().manual_seed(1)] * args.vae_batch_size

        def bare() -> tuple[float, float]:
            return seconds_of(lambda: [encode(batch, generators[: len(batch)]) for batch in batches])

        bare()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("bare", "memory", "disk", "look")}
        for _ in range(args.rounds):
            found["bare"].append(bare())
            found["memory"].append(caching("--cache_latents"))
            forget(folder)
            found["disk"].append(caching("--cache_latents_to_disk"))
            time.sleep(SETTLED_NS / 1e9)
            caching("--cache_latents_to_disk")  # leaves all entries in the index
            found["look"].append(caching("--cache_latents_to_disk"))
        wall, cpu = ({name: min(time[i] for time in times) for name, times in found.items()} for i in (0, 1))
        print(
            f"{args.vae} VAE, {args.count} images at {args.side}: {1000 * wall['bare'] / args.count:.2f} ms each bare"
        )
        for name in ("memory", "disk"):
            print(
                f"  {name}: {wall[name] / wall['bare']:.2f} x in wall time, {cpu[name] / cpu['bare']:.2f} x in CPU time"
            )
        print(f"  a start that finds them: {1000 * cpu['look'] / args.count:.3f} CPU ms each")


if __name__ == "__main__":
    main()
