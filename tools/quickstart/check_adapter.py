"""Measure an adapter on the quickstart's base model: what its images show at several strengths, judged by their pixels.

Prints, for each caption and strength, the share of images with the caption's shape and colour, and the mean radius of
the shapes. Prints, for each caption, the rank correlation (Spearman) of strength and radius over all its images.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.checkpoints.files import load_state_dict
from library.training.evaluation.strength_response import rank_correlation
from tools.command import command, make_parser
from tools.contact_sheet import parse_numbers
from tools.quickstart.sampling import Prompt, load_pipeline, merge_lora, sample
from tools.quickstart.toy_world import QUICKSTART, Seen, look_at, parse_caption

EXAMPLES = """\
  python3 tools/quickstart/check_adapter.py output/toy_slider/toy_slider.safetensors \\
    --captions "a red circle on a white background" --strengths=-2,-1,0,1,2"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("adapter", type=Path, help="adapter file that was trained on the base model")
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_base", help="diffusers folder")
    parser.add_argument("--captions", nargs="+", required=True, help="captions of the toy world")
    parser.add_argument(
        "--strengths", type=parse_numbers, default=[0.0, 1.0], help="separated by commas (default: 0,1)"
    )
    parser.add_argument("--colour", default="", help="colour to count for captions without one")
    parser.add_argument("--count", type=int, default=32, help="images per caption and strength (default: 32)")
    return parser


def draw_images(base: Path, adapter: Path, strength: float, captions: Sequence[str], count: int) -> list[list[Seen]]:
    """Return the contents of `count` images per caption; the seeds are 0, 1, ... at every strength."""
    pipeline: Any = load_pipeline(base)
    if strength:
        merge_lora(pipeline, load_state_dict(adapter), strength)
    return [
        [look_at(image) for image in sample(pipeline, [Prompt(caption, seed) for seed in range(count)])]
        for caption in captions
    ]


def describe(caption: str, colour: str, strengths: Sequence[float], seen: Sequence[Sequence[Seen]]) -> Iterator[str]:
    """Yield the lines of a caption; `seen` has its images by strength, `colour` is counted if it names none."""
    expected = parse_caption(f"{caption} {colour}")
    yield caption
    for strength, images in zip(strengths, seen, strict=True):
        shape_share = sum(image.shape == expected.shape for image in images) / len(images)
        colour_share = sum(image.colour == expected.colour for image in images) / len(images)
        radii = [image.radius for image in images if image.radius]
        radius = f"{mean(radii):.1f} px" if radii else "unknown"
        yield f"  strength {strength:4g}: shape {shape_share:.1%}, colour {colour_share:.1%}, radius {radius}"
    if len(strengths) > 1:
        points = [
            (s, image.radius) for s, images in zip(strengths, seen, strict=True) for image in images if image.radius
        ]
        correlation = rank_correlation([s for s, _ in points], [radius for _, radius in points])
        yield f"  rank correlation of strength and radius: {correlation:.2f}, {len(points)} images"


def check(args: argparse.Namespace) -> None:
    """Draw, check and print."""
    images_by_strength = [
        draw_images(args.base, args.adapter, strength, args.captions, args.count) for strength in args.strengths
    ]
    for number, caption in enumerate(args.captions):
        print(
            "\n".join(describe(caption, args.colour, args.strengths, [images[number] for images in images_by_strength]))
        )


main = command(setup_parser, check)

if __name__ == "__main__":
    sys.exit(main())
