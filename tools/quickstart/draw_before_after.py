"""Show what a LoRA taught the quickstart's base model, with the same prompts and seeds before and after.

Writes one image, `before | after`, and prints how many samples in each half show their prompt, apart for prompts that
are captions of the training and for new combinations. With --report the image is shown in the report of the run too.
"""

import argparse
import logging
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
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
from tools.quickstart.sampling import Prompt, find_right, load_pipeline, merge_lora, read_prompts, sample
from tools.quickstart.toy_world import QUICKSTART, ImageArray

logger = logging.getLogger(__name__)

CAPTIONS = QUICKSTART / "dataset"
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


@dataclass(frozen=True)
class Score:
    """How many samples show their prompt: of those whose prompt is a caption of the training, and of the others."""

    right: tuple[int, int]
    of: tuple[int, int]

    @property
    def share(self) -> float:
        return sum(self.right) / sum(self.of)

    def __str__(self) -> str:
        (trained, new), (num_trained, num_new) = self.right, self.of
        return f"{trained} of {num_trained} trained on, {new} of {num_new} new combinations"


def score(images: Sequence[ImageArray], prompts: Sequence[Prompt], captions: Set[str]) -> Score:
    is_new = [prompt.caption not in captions for prompt in prompts]
    right = [new for new, shows in zip(is_new, find_right(images, prompts), strict=True) if shows]
    return Score((right.count(False), right.count(True)), (is_new.count(False), is_new.count(True)))


def draw_before_and_after(
    base: Path, lora: Path, prompts_file: Path, out: Path, captions: Path = CAPTIONS
) -> tuple[Score, Score]:
    """Write the image. Return how many samples show their prompt before and after."""
    from safetensors.torch import load_file

    kind = marked(f"an image that {WRITER} wrote", WRITER)
    check_target("--out", out, kind, [lora, prompts_file])
    prompts = read_prompts(prompts_file)
    trained = {file.read_text(encoding="utf-8").strip() for file in captions.glob("*.txt")}
    weights = load_file(lora)
    pipeline = load_pipeline(base)
    before = sample(pipeline, prompts)
    merge_lora(pipeline, weights)
    after = sample(pipeline, prompts)
    scores = score(before, prompts, trained), score(after, prompts, trained)
    save_image(out, arrange(before, after, (f"before: {scores[0]}", f"after: {scores[1]}")), WRITER)
    return scores


def setup_parser() -> argparse.ArgumentParser:
    example = "  python3 tools/quickstart/draw_before_after.py --lora mine.safetensors --out before_after.png"
    parser = make_parser(__doc__, example)
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_base", help="diffusers folder of the base model")
    parser.add_argument("--lora", type=Path, required=True, help="LoRA file (kohya's key names) trained on it")
    parser.add_argument("--prompts", type=Path, default=QUICKSTART / "prompts.txt", help="prompts, one per line")
    parser.add_argument("--captions", type=Path, default=CAPTIONS, help="folder with the captions of its training")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--report", type=Path, help="report of the run, in which the image is shown too")
    return parser


def draw(args: argparse.Namespace) -> None:
    """Write the image and print the shares."""
    before, after = draw_before_and_after(args.base, args.lora, args.prompts, args.out, args.captions)
    if args.report is not None:
        with Image.open(args.out) as image:
            add_sheet(args.report, encode_data_url(image, *image.size))
    print_line(f"samples that show their prompt: {before} before; {after} after; see {args.out}")


main = command(setup_parser, draw)

if __name__ == "__main__":
    sys.exit(main())
