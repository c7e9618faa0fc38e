"""Measure an edit model, or a LoRA of it, on pairs of toy images: the number of correct edits, judged by the pixels.

Each image of --references is edited with the caption of its partner in --results. An edit is correct if shape, colour
and background match the partner, and the two shapes overlap by at least half of their union.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.toys.toy_files import text_kind, write_text
from library.base.command_parser import make_parser
from library.base.errors import UserError, list_few
from library.checkpoints.overwriting import check_target
from library.commands.command import command
from tools import draw
from tools.quickstart.toy_world import QUICKSTART, ImageArray, find_foreground, look_at

EXAMPLES = """\
  python3 -m benchmarks.toys check_edits --references output/toy_asked/other --results output/toy_asked/red \\
    --output output/toy_asked/drawn --adapter output/toy_recolour/toy_recolour.safetensors"""
FIRST_LINE = "# Written by benchmarks/toys/check_edits.py"
PROMPT_OPTIONS = "--w 64 --h 64 --s 20 --g 1"
ATTRIBUTES = ("shape", "colour", "background")
LEAST_OVERLAP = 0.5


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--references", type=Path, required=True, help="folder with the images to edit")
    parser.add_argument("--results", type=Path, required=True, help="folder with their partners and the captions")
    parser.add_argument("--output", type=Path, required=True, help="folder for the edited images and the prompts")
    parser.add_argument("--adapter", type=Path, help="adapter file that was trained on the base model")
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_edit_base", help="diffusers folder")
    return parser


def read_image(path: Path) -> ImageArray:
    return np.asarray(Image.open(path).convert("RGB"))


def judge(image: ImageArray, partner: ImageArray) -> dict[str, bool]:
    """Return which attributes of an image (64, 64, 3) match its partner's, and whether its shape's "place" does."""
    seen, expected = look_at(image), look_at(partner)
    foreground, partner_foreground = find_foreground(image), find_foreground(partner)
    return {
        **{name: getattr(seen, name) == getattr(expected, name) for name in ATTRIBUTES},
        "place": bool(
            (foreground & partner_foreground).sum() >= LEAST_OVERLAP * (foreground | partner_foreground).sum()
        ),
    }


def check_edits(args: argparse.Namespace) -> None:
    prompts = args.output / "prompts.txt"
    check_target("--output", prompts, text_kind("a file of prompts by this command", FIRST_LINE))
    partners = sorted(args.results.glob("*.png"))
    if not partners:
        raise UserError(f"--results {args.results} has no .png files; make_pairs.py --caption draws pairs")
    missing = [path.name for path in partners if not (args.references / path.name).is_file()]
    if missing:
        raise UserError(f"--references {args.references} lacks {list_few(missing)}, which --results has")
    lines = [
        f"{path.with_suffix('.txt').read_text(encoding='utf-8').strip()} --ci {args.references / path.name} "
        f"{PROMPT_OPTIONS} --d {number}"
        for number, path in enumerate(partners, 1)
    ]
    write_text(prompts, "\n".join([FIRST_LINE, *lines]) + "\n")
    adapter = [] if args.adapter is None else ["--adapter", str(args.adapter)]
    arguments = [str(args.base), "--prompts", str(prompts), "--output", str(args.output), *adapter]
    if draw.main([*arguments, "--t5xxl_max_token_length", "16"]):
        raise UserError("the images could not be drawn")
    image_paths = [args.output / f"{number:02}_{number}.png" for number in range(1, len(partners) + 1)]
    judged = [judge(read_image(image), read_image(path)) for image, path in zip(image_paths, partners, strict=True)]
    num_right = sum(all(matches.values()) for matches in judged)
    parts = [f"{name} {sum(matches[name] for matches in judged)}" for name in (*ATTRIBUTES, "place")]
    print(f"{num_right} of {len(judged)} edits are right ({', '.join(parts)})")


main = command(setup_parser, check_edits)
