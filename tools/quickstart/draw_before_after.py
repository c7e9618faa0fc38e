"""Show what a LoRA taught the quickstart's base model, with the same prompts and seeds before and after.

Writes one image, `before | after`, and prints the share of samples in each half that show their prompt. With --report
the image is shown in the report of the run too.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from library.base.launcher import prepare_for_torch

    prepare_for_torch()  # before torch is imported

from PIL import Image, ImageDraw, ImageFont

from library.base.command_parser import make_parser
from library.base.terminal import print_line
from library.checkpoints.marks import save_image
from library.checkpoints.overwriting import check_target, marked
from library.commands.command import command
from library.training.report_page.writer import add_sheet
from library.training.reporting.sample_images import encode_data_url
from tools.quickstart.sampling import count_right, load_pipeline, merge_lora, read_prompts, sample
from tools.quickstart.toy_world import QUICKSTART, ImageArray

logger = logging.getLogger(__name__)

WRITER = "tools/quickstart/draw_before_after.py"
ENLARGEMENT = 2
NUM_COLUMNS = 4  # in each half
GAP = 8
TITLE_HEIGHT = 28
INK, PAPER = (20, 20, 20), (255, 255, 255)


def arrange(before: Sequence[ImageArray], after: Sequence[ImageArray], titles: tuple[str, str]) -> Image.Image:
    """Lay out two sets of equally many images side by side, with a title above each."""
    cell = before[0].shape[0] * ENLARGEMENT + GAP
    half_width = NUM_COLUMNS * cell + 2 * GAP
    num_rows = -(-len(before) // NUM_COLUMNS)
    page = Image.new("RGB", (2 * half_width, TITLE_HEIGHT + num_rows * cell + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for half, (images, title) in enumerate(zip((before, after), titles, strict=True)):
        left = half * half_width + GAP
        pen.text((left, GAP), title, fill=INK, font=ImageFont.load_default(size=14))
        for n, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((cell - GAP, cell - GAP), Image.Resampling.NEAREST)
            page.paste(enlarged, (left + n % NUM_COLUMNS * cell, TITLE_HEIGHT + n // NUM_COLUMNS * cell))
            left_edge, top = left + n % NUM_COLUMNS * cell - 1, TITLE_HEIGHT + n // NUM_COLUMNS * cell - 1
            box = (left_edge, top, left_edge + cell - GAP + 1, top + cell - GAP + 1)
            pen.rectangle(box, outline=(200, 200, 200))
    pen.line([(half_width, 0), (half_width, page.height)], fill=INK)
    return page


def draw_before_and_after(base: Path, lora: Path, prompts_file: Path, out: Path) -> tuple[float, float]:
    """Write the image. Return the shares of samples that show their prompt, before and after."""
    from safetensors.torch import load_file

    kind = marked(f"an image that {WRITER} wrote", WRITER)
    check_target("--out", out, kind, [lora, prompts_file])
    prompts = read_prompts(prompts_file)
    weights = load_file(lora)
    pipeline = load_pipeline(base)
    before = sample(pipeline, prompts)
    merge_lora(pipeline, weights)
    after = sample(pipeline, prompts)
    shares = count_right(before, prompts) / len(prompts), count_right(after, prompts) / len(prompts)
    titles = (f"before: {shares[0]:.0%} as asked", f"after: {shares[1]:.0%} as asked")
    save_image(out, arrange(before, after, titles), WRITER)
    return shares


def setup_parser() -> argparse.ArgumentParser:
    example = "  python3 tools/quickstart/draw_before_after.py --lora mine.safetensors --out before_after.png"
    parser = make_parser(__doc__, example)
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_base", help="diffusers folder of the base model")
    parser.add_argument("--lora", type=Path, required=True, help="LoRA file (kohya's key names) trained on it")
    parser.add_argument("--prompts", type=Path, default=QUICKSTART / "prompts.txt", help="prompts, one per line")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--report", type=Path, help="report of the run, in which the image is shown too")
    return parser


def draw(args: argparse.Namespace) -> None:
    """Write the image and print the shares."""
    before, after = draw_before_and_after(args.base, args.lora, args.prompts, args.out)
    if args.report is not None:
        with Image.open(args.out) as image:
            add_sheet(args.report, encode_data_url(image, *image.size))
    print_line(f"samples that show their prompt: {before:.0%} before, {after:.0%} after; see {args.out}")


main = command(setup_parser, draw)

if __name__ == "__main__":
    sys.exit(main())
