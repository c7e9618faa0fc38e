"""Draw images with a base model and adapter files, at one strength or at several side by side.

The samplers are those of the previews. The base model is recognised from its file. Its other files, such as text
encoders, and its storage in memory are set by the options of its training script.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from PIL import Image

from library.base.errors import error_in
from library.checkpoints.marks import mark_of, save_image
from library.checkpoints.overwriting import FileKind, check_target, judge, marked
from library.commands.base_models import find_base, find_variant
from library.commands.command import make_training_parser, training_command
from library.commands.counted_plan import read_checked_options
from library.options.output.prompts import STRENGTH, PromptSpec, parse_number, parse_strip, read_prompts
from library.training.evaluation.prompts import refuse_strengths, resolve_all
from library.training.models.frozen_adapters import parse_adapter
from library.training.offline.adapter_files import Stack
from library.training.offline.contact_sheet import Row, arrange, draw_rows
from library.training.reporting.sample_images import Drawn, write_image
from library.types import Prompt
from tools.contact_sheet import find_device, parse_seed

logger = logging.getLogger(__name__)

DRAWN = Path("output/drawn")
SHEET = "strengths.png"  # of --strengths, in the folder of the images

EXAMPLES = """\
  python3 tools/draw.py configs/quickstart/toy_base --prompt "a red circle on blue --w 64 --h 64"
  python3 tools/draw.py model.safetensors --adapter output/my_cat/my_cat.safetensors \\
    --prompt "mycat, a cat on a sofa" --strengths 0 0.5 1"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_training_parser(__doc__, EXAMPLES, None, "the model's training script")
    parser.add_argument("model", help="file, diffusers folder, or name on the Hugging Face hub")
    parser.add_argument("--adapter", nargs="+", action="extend", default=[], metavar="FILE[:STRENGTH]", help="adapters")
    parser.add_argument("--prompt", nargs="+", default=[], help="prompts, with options as in a prompt file")
    parser.add_argument("--prompts", type=Path, help="file with prompts, as --sample_prompts takes it")
    parser.add_argument(
        "--strengths", type=parse_strength, nargs="+", help="factors for all adapters, one row each in a sheet"
    )
    parser.add_argument("--seed", type=parse_seed, default=1, help="seed of prompts without one (default: 1)")
    parser.add_argument(
        "--output", type=Path, help=f"folder (default: {DRAWN.as_posix()}, or with a number if it has other images)"
    )
    return parser


def parse_strength(text: str) -> float:
    """Parse a strength. Raises argparse.ArgumentTypeError for what is none, such as nan."""
    strength = parse_number(text)
    if not STRENGTH.fits(strength):
        raise argparse.ArgumentTypeError(f"{text!r} is no strength; use {STRENGTH.name}")
    return float(strength)


def scale_strengths(files: Stack, factor: float) -> Stack:
    """Multiply the strengths of the files by `factor`, and drop files of strength 0."""
    return [(file, strength * factor) for file, strength in files if strength * factor]


def read_specs(args: argparse.Namespace) -> list[PromptSpec]:
    """Return the prompts of --prompt and --prompts, all with a seed. Raises UserError if there are none."""
    if not args.prompt and not args.prompts:
        raise error_in("--prompt", others=["--prompts"], cause="missing")(
            "there is nothing to draw", "give --prompt, or --prompts with a file"
        )
    lines = enumerate(args.prompt, 1)
    specs = [spec for number, line in lines for spec in parse_strip(line, f"--prompt {number}")]
    specs += read_prompts(args.prompts, "--prompts") if args.prompts else []
    if args.strengths is not None:
        refuse_strengths(specs, "--strengths")
    return [replace(spec, seed=args.seed) if spec.seed is None else spec for spec in specs]


@dataclass(frozen=True)
class Target:
    """An image to draw: the number of its prompt, from 1, and its place."""

    number: int
    strength: float  # a factor of all adapters
    path: Path
    mark: str


@dataclass(frozen=True)
class DrawingPlan:
    """The images to draw into a folder, a row for each strength, and the sheet of --strengths."""

    rows: list[list[Target]]
    sheet: tuple[Path, str] | None  # with its mark

    def places(self) -> Iterator[tuple[Path, FileKind]]:
        targets = [(target.path, target.mark) for row in self.rows for target in row]
        for path, mark in [*targets, *([] if self.sheet is None else [self.sheet])]:
            yield path, marked("the image that this command draws there", mark)


def plan_images(
    args: argparse.Namespace, training: Sequence[str], files: Stack, specs: Sequence[PromptSpec]
) -> DrawingPlan:
    """Plan the images for --output, or for the first default folder without images of other commands.

    Raises UserError if --output has such images, or if an adapter would be replaced.
    """

    def plan(folder: Path) -> DrawingPlan:
        sheet = folder / SHEET
        mark = make_mark(sheet, args.model, training, files, args.strengths, specs)
        rows = plan_rows(args, folder, training, files, specs)
        return DrawingPlan(rows, None if args.strengths is None else (sheet, mark))

    if args.output is None:
        folders = (DRAWN if number == 1 else DRAWN.with_name(f"{DRAWN.name}-{number}") for number in count(1))
        plans = map(plan, folders)
        chosen = next(p for p in plans if all(judge(path, kind) != "foreign" for path, kind in p.places()))
    else:
        chosen = plan(args.output)
    for path, kind in chosen.places():
        check_target("--output", path, kind, [file for file, _ in files])
    return chosen


def plan_rows(
    args: argparse.Namespace, folder: Path, training: Sequence[str], files: Stack, specs: Sequence[PromptSpec]
) -> list[list[Target]]:
    """Return a row of images for each strength, as adapters are attached once for each: those of --strengths for every
    prompt, else those of the prompts, in their order."""

    def plan(number: int, spec: PromptSpec, strength: float) -> Target:
        ending = f"_{strength:g}" if args.strengths is not None or strength != 1 else ""
        path = folder / f"{number:02}{ending}_{spec.seed}.png"
        mark = make_mark(path, args.model, training, scale_strengths(files, strength), spec)
        return Target(number, strength, path, mark)

    numbered = list(enumerate(specs, 1))
    if args.strengths is not None:
        return [[plan(number, spec, strength) for number, spec in numbered] for strength in args.strengths]
    own = [1.0 if spec.strength is None else spec.strength for spec in specs]
    return [
        [plan(number, spec, strength) for (number, spec), s in zip(numbered, own, strict=True) if s == strength]
        for strength in dict.fromkeys(own)
    ]


def make_mark(path: Path, model: str, training: Sequence[str], *content: object) -> str:
    """Return the mark of an image, which holds a digest of what is drawn: another prompt or adapter replaces none."""
    return mark_of(f"tools/draw.py {digest_of(model, list(training), content)}", path)


def digest_of(*content: object) -> str:
    return blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def draw(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Draw and write the images. Raises UserError for invalid options, and for files that do not fit the model."""
    files = [parse_adapter(text, "--adapter") for text in args.adapter]
    specs = read_specs(args)
    planned = plan_images(args, training, files, specs)
    rows = planned.rows
    if not files and any(target.strength != 1 for row in rows for target in row):
        logger.warning("strengths have no effect: they are those of --adapter, and none is given")
    prompts, images = draw_targets("MODEL", args.model, training, files, specs, rows)
    if planned.sheet is not None:
        sheet, sheet_mark = planned.sheet
        labels = [f"strength {strength:g}" for strength in args.strengths]
        save_image(sheet, arrange(images, labels, [f"{p.seed}: {p.text}" for p in prompts], 512), sheet_mark)
        logger.info("wrote %s", sheet)


def draw_targets(
    flag: str,
    name: str,
    training: Sequence[str],
    files: Stack,
    specs: Sequence[PromptSpec],
    rows: Sequence[Sequence[Target]],
) -> tuple[list[Prompt], list[list[Image.Image]]]:
    """Draw and write the targets with the base model `name`, which `flag` gives. Return the prompts and the images."""
    _, spec = find_base(flag, name, ("unet", "transformer"), "text_encoder", variant=find_variant(training))
    # The name, as the script fetches parts from the hub that are not needed to recognise the base model.
    model_options = [*spec.script_flag.split(), "--pretrained_model_name_or_path", name]
    _, options = read_checked_options(spec.script, [*model_options, *training])
    arch = (spec.build_to_draw or spec.build)(options)
    prompts = resolve_all(specs, arch)
    prompts_by_row = [[replace(prompts[target.number - 1], strength=target.strength) for target in row] for row in rows]
    drawn_rows = draw_rows(
        options.network, options.precision, options.memory, arch,
        [
            Row(scale_strengths(files, row[0].strength), row_prompts)
            for row, row_prompts in zip(rows, prompts_by_row, strict=True)
        ],
        find_device(),
    )  # fmt: skip
    images = []
    for row, row_prompts, drawn in zip(rows, prompts_by_row, drawn_rows, strict=True):
        for target, prompt, image in zip(row, row_prompts, drawn, strict=True):
            write_image(target.path, Drawn(target.number, prompt, image), target.mark)
            logger.info("wrote %s", target.path)
        images.append(drawn)
    return prompts, images


main = training_command(setup_parser, draw)

if __name__ == "__main__":
    sys.exit(main())
