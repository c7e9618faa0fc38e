"""Draw pairs of toy images that differ in one word, with captions that omit the word or name both.

Both images of a pair have the same position, size and rotation, as far as the word allows. By default the pairs are
data for --preference_loss and --pair_slider: `image_dir` is <out>/<first word>, `opposite_dir` is <out>/<second word>.
With --caption they are data for edit models: `image_dir` is <out>/<first word>, `control_dirs` is [<out>/<second
word>].
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.toys.toy_files import check_scene, save_scene
from library.base.command_parser import make_parser
from library.base.errors import UserError
from library.commands.command import command
from tools.quickstart.toy_world import COLOURS, SIZES, Scene, draw_scene, list_scenes

EXAMPLES = """\
  python3 -m benchmarks.toys make_pairs --out output/toy_pairs --words blue other
  python3 -m benchmarks.toys make_pairs --out output/toy_edits --caption "make the shape red" --words red other"""
WRITER = "benchmarks/toys/make_pairs.py"
OTHER = "other"  # a different other colour in each pair
WORDS = {"colour": tuple(COLOURS), "size": tuple(SIZES)}


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--words", nargs=2, required=True, help="two colours, a colour and other, or two sizes")
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--name_both", action="store_true", help='captions name both words, as in "red or orange"')
    captions.add_argument("--caption", help="caption of every pair, such as the instruction of an edit")
    parser.add_argument("--count", type=int, default=60, help="pairs, of scenes drawn at random (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and the drawing")
    return parser


def draw_pair(scene: Scene, attribute: str, words: Sequence[str], seed: int) -> list[Image.Image]:
    """Draw a scene once with each word, from the same seed."""
    changes: list[dict[str, Any]] = [{attribute: word} for word in words]
    scenes = [replace(scene, **change) for change in changes]
    return [Image.fromarray(draw_scene(variant, np.random.default_rng(seed))) for variant in scenes]


def make_pairs(args: argparse.Namespace) -> None:
    """Write each word's images into its folder, and the captions next to those of the first word."""
    attribute = next((name for name, known in WORDS.items() if set(args.words) <= {*known, OTHER}), None)
    if attribute is None or args.words[0] in (OTHER, args.words[1]):
        raise UserError(
            f"--words {' '.join(args.words)}: give two of {', '.join(COLOURS)}, one of them and {OTHER}, or "
            f"{' '.join(SIZES)}"
        )
    for word in args.words:
        for number in range(args.count):
            check_scene("--out", args.out / word / f"{number:03}.png", WRITER)
    rng = np.random.default_rng(args.seed)
    scenes = [scene for scene in list_scenes() if getattr(scene, attribute) == args.words[0]]
    for number in range(args.count):
        scene = scenes[int(rng.integers(len(scenes)))]
        other_words = [word for word in WORDS[attribute] if word != args.words[0]]
        pair_words = [
            args.words[0],
            other_words[number % len(other_words)] if args.words[1] == OTHER else args.words[1],
        ]
        both_words = " or ".join(pair_words) if args.name_both else ""
        caption = args.caption or " ".join(scene.caption().replace(args.words[0], both_words).split())
        images = draw_pair(scene, attribute, pair_words, 1000 * args.seed + number)
        for word, image, text in zip(args.words, images, (caption, None), strict=True):
            save_scene(args.out / word / f"{number:03}.png", image, WRITER, text)


main = command(setup_parser, make_pairs)
