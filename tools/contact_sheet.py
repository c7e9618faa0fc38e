"""Generate a contact sheet: the same prompts and seeds without an adapter and with each of several adapter files,
loading the base model once. The training options determine the model and how it is stored."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import mean

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from PIL import Image

from library.base.errors import about, error_in
from library.checkpoints.files import display_path, file_in_folder
from library.checkpoints.marks import mark_of, save_image
from library.checkpoints.overwriting import check_target
from library.commands.command import check_at_least_one, make_training_parser, training_command, written_by
from library.commands.counted_plan import read_checked_options
from library.options.output.prompts import read_preview_prompts
from library.options.output.saving import SavingOptions
from library.options.training.run import MAX_SEED
from library.protocols import LatentSpec
from library.training.evaluation.image_scores import Scorer, format_means, read_scorer
from library.training.evaluation.prompt_images import show_with_references
from library.training.evaluation.prompts import refuse_strengths, resolve_all
from library.training.evaluation.strength_response import FEWEST, measure_response
from library.training.models.opening import open_data_plan
from library.training.models.text_caching import TextPlan
from library.training.offline.adapter_files import Stack
from library.training.offline.contact_sheet import Row, arrange, draw_rows
from library.training.report_page.writer import add_sheet
from library.training.reporting.sample_images import encode_data_url
from library.training.saving.names import Names
from library.training.saving.run_lock import run_lock
from library.training.saving.saved_files import drop_copies, files_of_run
from library.types import Prompt

logger = logging.getLogger(__name__)

WRITER = "tools/contact_sheet.py"
LARGEST_IN_REPORT = 1800, 12_000  # maximum width and height in pixels

EXAMPLES = """\
  python3 tools/contact_sheet.py --script train_network.py --config_file configs/quickstart/train.toml \\
    --sample_prompts configs/quickstart/prompts.txt --seeds 1 2"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_training_parser(__doc__, EXAMPLES)
    parser.add_argument("--files", type=Path, nargs="+", help="adapter files; unset: all of the run in --output_dir")
    add_seeds(parser)
    parser.add_argument(
        "--multipliers",
        type=parse_numbers,
        metavar="A,B,...",
        help="draw every file at these strengths, side by side, and print how well the images follow them; "
        "needs =, as in --multipliers=-2,-1,0,1,2",
    )
    parser.add_argument("--sheet", type=Path, help="PNG to write; unset: <output_name>-sheet.png in --output_dir")
    parser.add_argument("--side", type=int, default=256, help="largest side of an image, in pixels (default: 256)")
    return parser


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Add --seeds, the seeds of each prompt, for `expand_columns`."""
    parser.add_argument("--seeds", type=parse_seed, nargs="+", help="seeds of each prompt; unset: its own, else 1")


def parse_numbers(text: str) -> list[float]:
    """Parse numbers separated by commas. Raises argparse.ArgumentTypeError."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as -2,-1,0,1,2")
    return numbers


def parse_seed(text: str) -> int:
    """Parse the seed of an image. Raises argparse.ArgumentTypeError for one that torch does not take."""
    try:
        seed = int(text)
    except ValueError:
        seed = MAX_SEED + 1
    if abs(seed) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; use a whole number of at most {MAX_SEED}")
    return seed


def label_rows(files: Sequence[Path]) -> list[str]:
    """Return the row labels; the first row has no adapter."""
    return ["without an adapter", *(display_path(path).name.removesuffix(path.suffix) for path in files)]


def choose_files(named: list[Path] | None, saving: SavingOptions) -> list[Path]:
    """Return the named files, else the adapter files of the run; a PEFT folder is replaced by the file in it.

    Raises UserError if there are none.
    """
    for path in named or ():
        if not path.exists():
            raise about("--files", path, cause="missing")("does not exist")
    if named:
        return [file_in_folder(path, f"--files {path}") for path in named]
    if not saving.output_dir:
        raise error_in("--files", cause="missing")("no adapter files: set --files, or --output_dir to search for them")
    names = Names.build(saving)
    files = files_of_run(names)
    if not files:
        raise about("--output_dir", names.folder)("contains no adapter files of this name", "list some with --files")
    return files


def update_report(saving: SavingOptions, update: Callable[[Path], None]) -> None:
    """Let `update` change the report of a run, if there is one."""
    if saving.output_dir and (report := Names.build(saving).of_report()).is_file():
        # A run that is still going on rewrites its report; the lock keeps the two writers apart.
        with run_lock(saving):
            update(report)
        logger.info("updated %s", report)


def find_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU if there is none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None else device


def expand_columns(prompts: Sequence[Prompt], seeds: Sequence[int] | None) -> list[Prompt]:
    """Return every combination of a prompt and a seed; without `seeds`, each prompt keeps its own seed, or gets 1."""
    return [replace(p, seed=seed) for p in prompts for seed in seeds or [1 if p.seed is None else p.seed]]


def arrange_strips(
    drawn: Sequence[Sequence[Image.Image]],
    files: Sequence[Path],
    prompts: Sequence[Prompt],
    multipliers: Sequence[float],
    side: int,
    spec: LatentSpec,
) -> Image.Image:
    """Arrange one row per file and prompt, with one image per strength; log the rank correlations of strength and
    change.

    Images of strength 0 come from the base model alone. Reference images, prepared for `spec`, are on the left of each
    image.
    """
    rows, labels = [], []
    for number, name in enumerate(label_rows(files)[1:]):
        file_rows = drawn[number * len(multipliers) : (number + 1) * len(multipliers)]
        correlations = []
        for column, prompt in enumerate(prompts):
            row = [images[column] for images in file_rows]
            label = f"{name}, {prompt.seed}: {prompt.text}"
            if len(set(multipliers)) >= FEWEST:
                correlations.append(measure_response(multipliers, row).correlation)
                label = f"{correlations[-1]:.2f} {label}"
            rows.append([show_with_references(prompt, image, spec) for image in row])
            labels.append(label)
        if correlations:
            finite = [c for c in correlations if isfinite(c)]
            logger.info(
                "%s: rank correlation of strength and change %s", name, format_correlations(finite, len(correlations))
            )
    return arrange(rows, labels, [f"strength {strength:g}" for strength in multipliers], side)


def format_correlations(known: Sequence[float], num_images: int) -> str:
    """Format the mean and the minimum of the finite correlations among `num_images` rows."""
    if not known:
        return "unknown: all images are equal"
    num_unchanged = num_images - len(known)
    suffix = f"; {num_unchanged} do not change" if num_unchanged else ""
    return f"{mean(known):.2f} on average, lowest {min(known):.2f}, {len(known)} prompts and seeds{suffix}"


def log_scores(
    scorer: Scorer | None, labels: Sequence[str], drawn: Sequence[Sequence[Image.Image]], prompts: Sequence[Prompt]
) -> None:
    """Log the mean scores of each row's images; nothing without a scorer."""
    if scorer is not None:
        for label, images in zip(labels, drawn, strict=True):
            logger.info("%s: %s", label, format_means(scorer.score(images, [prompt.text for prompt in prompts])))


def draw_sheet(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Generate the sheet. Raises UserError for invalid options, and for files of another base model."""
    base, options = read_checked_options(args.script, training)
    check_at_least_one(args, "side")
    if not options.preview.sample_prompts:
        raise about("--sample_prompts")("contains no prompts")
    files = choose_files(args.files, options.saving)
    target = args.sheet
    if target is None and options.saving.output_dir:
        target = Names.build(options.saving).path_with_ending("-sheet.png")
    if target is None:
        raise about("--sheet", cause="missing")("is not set", "set the PNG to write, or --output_dir")
    check_target("--sheet", target, written_by(WRITER, target), [*files, Path(options.preview.sample_prompts)])
    files = drop_copies(files)
    arch, device = base.build(options), find_device()
    draw = partial(draw_rows, options.network, options.precision, options.memory, arch)
    specs = read_preview_prompts(options.preview)
    refuse_strengths(specs, "--multipliers")
    columns, spec = expand_columns(resolve_all(specs, arch), args.seeds), arch.codec.spec
    scorer = None
    if options.preview.score_previews:
        text = TextPlan.resolve(options.network, arch.text_cache)
        scorer = read_scorer(options.preview, open_data_plan(options, arch, text, options.run.seed or 0, 1))
    if args.multipliers is not None:
        stacks: list[Stack] = [[(file, s)] if s else [] for file in files for s in args.multipliers]
        drawn_rows = list(draw([Row(stack, columns) for stack in stacks], device))
        labels = [f"{name}, strength {s:g}" for name in label_rows(files)[1:] for s in args.multipliers]
        log_scores(scorer, labels, drawn_rows, columns)
        sheet = arrange_strips(drawn_rows, files, columns, args.multipliers, args.side, spec)
    else:
        images = list(draw([Row([], columns), *(Row([(file, 1.0)], columns) for file in files)], device))
        log_scores(scorer, label_rows(files), images, columns)
        images = [
            [show_with_references(p, image, spec) for p, image in zip(columns, row, strict=True)] for row in images
        ]
        sheet = arrange(images, label_rows(files), [f"{prompt.seed}: {prompt.text}" for prompt in columns], args.side)
    save_image(target, sheet, mark_of(WRITER, target))
    logger.info("wrote %s", target)
    update_report(options.saving, lambda report: add_sheet(report, encode_data_url(sheet, *LARGEST_IN_REPORT)))


main = training_command(setup_parser, draw_sheet)

if __name__ == "__main__":
    sys.exit(main())
