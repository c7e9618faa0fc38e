"""Measure an adapter on the quickstart's base model, or that model alone: what its images show, judged by their pixels.

Prints, for each caption and strength, the share of images with its shape and its colour, the share that shows all of it
but the size, and the mean radius of the shapes. At other strengths than 0, if 0 is measured too, the mean difference
from its images, in values of 0 to 255, follows. Prints, for each caption, the rank correlation (Spearman) of strength
and radius over all its images. Without captions, those of the known world and of the unseen shapes are drawn.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from torch import Tensor

from library.base.command_parser import make_parser
from library.checkpoints.files import load_state_dict
from library.commands.command import command
from library.training.evaluation.strength_response import rank_correlation
from tools.contact_sheet import parse_numbers
from tools.quickstart.sampling import GUIDANCE_SCALE, SAMPLING_STEPS, Prompt, load_pipeline, merge_lora, sample
from tools.quickstart.toy_world import (
    HELD_OUT_SHAPES,
    KNOWN_SHAPES,
    QUICKSTART,
    ImageArray,
    list_scenes,
    look_at,
    parse_caption,
)

EXAMPLES = """\
  python3 -m benchmarks.toys check_adapter output/toy_slider/toy_slider.safetensors \\
    --captions "a red circle on a white background" --strengths=-2,-1,0,1,2
  python3 -m benchmarks.toys check_adapter --strengths 0 --count 200"""

SHARES = re.compile(r"  strength +(\S+): shape (\S+)%, colour (\S+)%, .*as asked (\S+)%")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("adapter", type=Path, nargs="?", help="adapter file that was trained on the base model")
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_base", help="diffusers folder")
    parser.add_argument("--captions", nargs="+", help="captions of the toy world; unset: those of the known world")
    parser.add_argument(
        "--strengths", type=parse_numbers, default=[0.0, 1.0], help="separated by commas (default: 0,1)"
    )
    parser.add_argument("--colour", default="", help="colour to count for captions without one")
    parser.add_argument("--count", type=int, default=32, help="images per caption and strength (default: 32)")
    return parser


def list_prompts(captions: Sequence[str] | None, count: int) -> dict[str, list[Prompt]]:
    """Return `count` prompts for each caption; without captions, of scenes of each part of the toy world."""
    if captions is not None:
        return {caption: [Prompt(caption, seed) for seed in range(count)] for caption in captions}
    parts = {"known world": KNOWN_SHAPES, **{f"{shape}, never seen": (shape,) for shape in HELD_OUT_SHAPES}}
    return {name: draw_prompts(shapes, count) for name, shapes in parts.items()}


def draw_prompts(shapes: tuple[str, ...], count: int) -> list[Prompt]:
    """Choose scenes, repeating one only after all have been used, and give each a seed."""
    rng, scenes = np.random.default_rng(1), list_scenes(shapes)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(-(-count // len(scenes)))])[:count]
    return [Prompt(scenes[int(row)].caption(), 1000 + number) for number, row in enumerate(order)]


def draw_images(
    base: Path,
    weights: dict[str, Tensor],
    parts: Iterable[Sequence[Prompt]],
    strength: float = 1.0,
    guidance: float = GUIDANCE_SCALE,
    num_steps: int = SAMPLING_STEPS,
) -> list[list[ImageArray]]:
    """Return the images of each part, with an adapter's weights unless they are empty."""
    pipeline = load_pipeline(base)
    if weights and strength:
        merge_lora(pipeline, weights, strength)
    return [sample(pipeline, prompts, guidance, num_steps) for prompts in parts]


def describe(prompts: Sequence[Prompt], colour: str, images: Mapping[float, Sequence[ImageArray]]) -> Iterator[str]:
    """Yield the lines of a caption's images by strength; `colour` is counted if the caption names none."""
    expected = [parse_caption(f"{prompt.caption} {colour}") for prompt in prompts]
    strengths: list[float] = []
    all_radii: list[float] = []
    for strength, drawn in images.items():
        seen = [look_at(image) for image in drawn]
        pairs = list(zip(seen, expected, strict=True))
        shape, tint = mean(s.shape == e.shape for s, e in pairs), mean(s.colour == e.colour for s, e in pairs)
        radii = [image.radius for image in seen if image.radius]
        radius = f"{mean(radii):.1f} px" if radii else "unknown"
        line = f"  strength {strength:4g}: shape {shape:.1%}, colour {tint:.1%}, radius {radius}"
        line += f", as asked {mean(s.shows(e) for s, e in pairs):.1%}"
        if strength and 0.0 in images:
            difference = np.abs(np.stack(drawn).astype(float) - np.stack(images[0.0])).mean()
            line += f", differs by {difference:.1f} of 255"
        yield line
        strengths += [strength] * len(radii)
        all_radii += radii
    if len(images) > 1:
        correlation = rank_correlation(strengths, all_radii)
        yield f"  rank correlation of strength and radius: {correlation:.2f}, {len(all_radii)} images"


def read_shares(printed: str) -> dict[str, dict[float, tuple[float, float, float]]]:
    """Map each caption that this command printed, and each strength, to its shares: shape, colour, all as asked."""
    shares: dict[str, dict[float, tuple[float, float, float]]] = {}
    caption = ""
    for line in printed.splitlines():
        if found := SHARES.match(line):
            strength, *percents = map(float, found.groups())
            shares.setdefault(caption, {})[strength] = (percents[0] / 100, percents[1] / 100, percents[2] / 100)
        elif not line.startswith(" "):
            caption = line
    return shares


def check(args: argparse.Namespace) -> None:
    """Draw, check and print."""
    prompts = list_prompts(args.captions, args.count)
    weights = {} if args.adapter is None else load_state_dict(args.adapter)
    drawn = {strength: draw_images(args.base, weights, prompts.values(), strength) for strength in args.strengths}
    for number, (caption, of_caption) in enumerate(prompts.items()):
        images = {strength: by_caption[number] for strength, by_caption in drawn.items()}
        print("\n".join([caption, *describe(of_caption, args.colour, images)]))


main = command(setup_parser, check)
