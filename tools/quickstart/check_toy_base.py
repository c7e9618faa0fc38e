"""Measure the quickstart's base model: the share of its images that show their prompt.

Prompts of the known toy world are sampled with fixed seeds through diffusers' pipeline (DDIM), and every image is
judged by its pixels. Shapes outside the training set are counted too: they should almost never appear.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import library  # noqa: F401  # checks the packages before they are imported

import numpy as np
import torch

from library.checkpoints.overwriting import check_target
from tools.command import command, make_parser
from tools.quickstart.sampling import GUIDANCE_SCALE, SAMPLING_STEPS, Prompt, load_pipeline, sample
from tools.quickstart.toy_files import image_kind
from tools.quickstart.toy_world import HELD_OUT_SHAPES, QUICKSTART, ImageArray, Scene, list_scenes, look_at

logger = logging.getLogger(__name__)

WRITER = "tools/quickstart/check_toy_base.py"
ATTRIBUTES = ("shape", "colour", "background", "style", "size")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def draw_prompts(scenes: Sequence[Scene], count: int, seed: int) -> tuple[list[Scene], list[Prompt]]:
    """Choose `count` scenes, repeating one only after all have been used, and give each a seed."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(-(-count // len(scenes)))])[:count]
    chosen = [scenes[int(n)] for n in order]
    return chosen, [Prompt(scene.caption(), 1000 * seed + n) for n, scene in enumerate(chosen)]


def measure(images: Sequence[ImageArray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the share of correct images for each attribute, and for all attributes except the size."""
    seen = [look_at(image) for image in images]
    pairs = list(zip(seen, scenes, strict=True))
    shares = {
        name: float(np.mean([getattr(s, name) == getattr(scene, name) for s, scene in pairs])) for name in ATTRIBUTES
    }
    return {"all but size": float(np.mean([s.shows(scene) for s, scene in pairs])), **shares}


def save_grid(images: Sequence[ImageArray], path: Path, num_columns: int = 20) -> None:
    """Write images as a grid into one PNG."""
    from PIL import Image

    from library.checkpoints.marks import save_image

    blank = np.zeros_like(images[0])
    filled = [*images, *[blank] * (-len(images) % num_columns)]
    rows = [np.concatenate(filled[n : n + num_columns], axis=1) for n in range(0, len(filled), num_columns)]
    save_image(path, Image.fromarray(np.concatenate(rows)), WRITER)


def format_shares(shares: dict[str, float]) -> str:
    """Format shares as "all but size 93.0%, shape 95.0%"."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def check(pipeline: Any, count: int, seed: int, image: Path | None) -> list[str]:
    """Sample and check images; return the result as lines, and write them to `image` if given."""
    scenes, prompts = draw_prompts(list_scenes(), count, seed)
    images = sample(pipeline, prompts)
    lines = [f"known world, {count} prompts: {format_shares(measure(images, scenes))}"]
    for shape in HELD_OUT_SHAPES:
        unseen_scenes, unseen_prompts = draw_prompts(list_scenes((shape,)), count // 2, seed)
        unseen = sample(pipeline, unseen_prompts)
        lines.append(f"{shape}, never seen, {count // 2} prompts: {format_shares(measure(unseen, unseen_scenes))}")
        images += unseen
    if image is not None:
        save_grid(images, image)
    return lines


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "  python3 tools/quickstart/check_toy_base.py --count 200")
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_base", help="diffusers folder")
    parser.add_argument("--count", type=int, default=200, help="prompts of the known world, half as many of the unseen")
    parser.add_argument("--seed", type=int, default=1, help="seed of the prompts and of their noise")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the model")
    parser.add_argument("--image", type=Path, help="write all samples into this PNG as well")
    return parser


def print_shares(args: argparse.Namespace) -> None:
    """Sample, check and print."""
    if args.image is not None:
        check_target("--image", args.image, image_kind(WRITER))
    logger.info("DDIM, %d steps, guidance %g, %s", SAMPLING_STEPS, GUIDANCE_SCALE, args.dtype)
    print("\n".join(check(load_pipeline(args.base, DTYPES[args.dtype]), args.count, args.seed, args.image)))


main = command(setup_parser, print_shares)

if __name__ == "__main__":
    sys.exit(main())
