"""Draw the quickstart's dataset: images and captions of one shape, by default one that the base model has never seen.

Three quarters of the shape's scenes are in the dataset. The prompts cover some of these and all the others, which tests
whether the LoRA learned the shape rather than the images.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.toys.toy_files import check_scene, save_scene, text_kind, write_text
from library.base.command_parser import make_parser
from library.checkpoints.overwriting import check_target
from library.commands.command import command
from tools.quickstart.toy_world import HELD_OUT_SHAPES, KNOWN_SHAPES, QUICKSTART, draw_scene, list_scenes

logger = logging.getLogger(__name__)

NUM_TRAINED_PROMPTS = 14
WRITER = "benchmarks/toys/make_dataset.py"
HEADING = "# the first {} combinations are not in the dataset"
PROMPT_OPTIONS = "--w 64 --h 64 --s 20 --l 2"


def make_dataset(args: argparse.Namespace) -> None:
    """Write `shape_00.png`, `shape_00.txt` and so on, and the file of prompts."""
    rng = np.random.default_rng(args.seed)
    shape, scenes = args.shape, list_scenes((args.shape,))
    shuffled = [scenes[int(n)] for n in rng.permutation(len(scenes))]
    paths = [args.out / f"{shape}_{n:02}.png" for n in range(args.num_images)]
    check_target("--prompts", args.prompts, text_kind(f"a file of prompts by {WRITER}", HEADING.format(r"\d+")))
    for path in paths:
        check_scene("--out", path, WRITER)
    for path, scene in zip(paths, shuffled, strict=False):
        save_scene(path, Image.fromarray(draw_scene(scene, rng)), WRITER, scene.caption())
    prompted = shuffled[args.num_images :] + shuffled[:NUM_TRAINED_PROMPTS]
    lines = [f"{scene.caption()} {PROMPT_OPTIONS} --d {n + 1}" for n, scene in enumerate(prompted)]
    heading = HEADING.format(len(shuffled) - args.num_images)
    write_text(args.prompts, "\n".join([heading, *lines]) + "\n")
    logger.info("%s: %d images; %s: %d prompts", args.out, args.num_images, args.prompts, len(lines))


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "  python3 -m benchmarks.toys make_dataset --shape heart")
    parser.add_argument("--out", type=Path, default=QUICKSTART / "dataset", help="folder of images and captions")
    parser.add_argument("--prompts", type=Path, default=QUICKSTART / "prompts.txt", help="file of prompts to write")
    parser.add_argument("--shape", choices=(*HELD_OUT_SHAPES, *KNOWN_SHAPES), default="heart", help="shape to draw")
    parser.add_argument("--num_images", type=int, default=32, help="images, of the shape's 42 scenes")
    parser.add_argument("--seed", type=int, default=1, help="seed of the scenes and the drawing")
    return parser


main = command(setup_parser, make_dataset)
