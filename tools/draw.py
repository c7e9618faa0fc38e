"""Draw images with a base model and adapter files, at one strength or at several side by side.

The samplers are those of the previews. The base model is recognised from its file. Its other files, such as text
encoders, and its storage in memory are set by the options of its training script.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.files import atomic_path, file_in_folder
from library.checkpoints.overwriting import PNG, check_overwrite
from library.errors import UserError
from library.training.command_line.checks import check_precision, check_values
from library.training.evaluation.prompts import RANGES, parse_strip, read_prompts, refuse_strengths, resolve_all
from library.training.offline.adapter_files import Stack
from library.training.offline.contact_sheet import Row, arrange, draw_rows
from library.training.reporting.sample_images import Drawn, write_image
from library.types import Prompt
from tools.base_models import find_base
from tools.command import make_training_parser, training_command
from tools.contact_sheet import find_device, parse_seed
from tools.plan_memory import read_training_options

logger = logging.getLogger(__name__)

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
    parser.add_argument("--output", type=Path, default=Path("output/drawn"), help="folder (default: output/drawn)")
    return parser


def parse_strength(text: str) -> float:
    """Parse a strength. Raises argparse.ArgumentTypeError for what is none, such as nan."""
    low, high = RANGES["strength"]
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not low <= strength <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no strength; use a number from {low:g} to {high:g}")
    return strength


def parse_adapter(text: str) -> tuple[Path, float]:
    """Parse FILE[:STRENGTH]; the default strength is 1. Raises UserError if the file does not exist or the strength is
    not finite."""
    # A colon may belong to the path instead, as in C:\adapter.safetensors.
    name, _, strength = text.rpartition(":")
    try:
        path, factor = (Path(name), float(strength)) if name else (Path(text), 1.0)
    except ValueError:
        path, factor = Path(text), 1.0
    if not path.exists():
        raise UserError(f"--adapter {path} does not exist")
    if not math.isfinite(factor):
        raise UserError(f"--adapter {text}: the strength is {factor}; use a number, such as 0.8")
    return file_in_folder(path, f"--adapter {path}"), factor


def scale_strengths(files: Stack, factor: float) -> Stack:
    """Multiply the strengths of the files by `factor`, and drop files of strength 0."""
    return [(file, strength * factor) for file, strength in files if strength * factor]


def draw(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Draw and write the images. Raises UserError for invalid options, and for files that do not fit the model."""
    files = [parse_adapter(text) for text in args.adapter]
    if not args.prompt and not args.prompts:
        raise UserError("there is nothing to draw; give --prompt, or --prompts with a file")
    path, spec = find_base("MODEL", args.model, "unet", "transformer", "text_encoder")
    model_options = [*spec.script_flag.split(), "--pretrained_model_name_or_path", str(path)]
    _, options = read_training_options(spec.script, [*model_options, *training])
    check_values(options)
    check_precision(options)
    arch = spec.build(options)
    lines = enumerate(args.prompt, 1)
    specs = [spec for number, line in lines for spec in parse_strip(line, f"--prompt {number}")]
    specs += read_prompts(args.prompts, "--prompts") if args.prompts else []
    if args.strengths is not None:
        refuse_strengths(specs, "--strengths")
    prompts = resolve_all(specs, arch)
    prompts = [replace(prompt, seed=args.seed) if prompt.seed is None else prompt for prompt in prompts]
    if args.strengths is None:
        rows = group_by_strength(list(enumerate(prompts, 1)))
    else:
        rows = [
            [(number, replace(prompt, strength=strength)) for number, prompt in enumerate(prompts, 1)]
            for strength in args.strengths
        ]
    if not files and any(prompt.strength != 1 for row in rows for _, prompt in row):
        logger.warning("strengths have no effect: they are those of --adapter, and none is given")
    sheet = None if args.strengths is None else args.output / "strengths.png"
    targets = [[args.output / name_image(number, prompt, sheet is not None) for number, prompt in row] for row in rows]
    for target in [*(target for row in targets for target in row), *([] if sheet is None else [sheet])]:
        check_overwrite("--output", target, PNG, [file for file, _ in files])
    drawn_rows = draw_rows(
        options.network, options.precision, options.memory, arch,
        [Row(scale_strengths(files, row[0][1].strength), [prompt for _, prompt in row]) for row in rows], find_device(),
    )  # fmt: skip
    images = []
    for row, paths, drawn in zip(rows, targets, drawn_rows, strict=True):
        for (number, prompt), path, image in zip(row, paths, drawn, strict=True):
            write_image(path, Drawn(number, prompt, image))
            logger.info("wrote %s", path)
        images.append(drawn)
    if sheet is not None:
        labels = [f"strength {strength:g}" for strength in args.strengths]
        with atomic_path(sheet) as temporary:
            arrange(images, labels, [f"{p.seed}: {p.text}" for p in prompts], 512).save(temporary, format="PNG")
        logger.info("wrote %s", sheet)


def group_by_strength(numbered: Sequence[tuple[int, Prompt]]) -> list[list[tuple[int, Prompt]]]:
    """Return a row for each strength, in the order of the prompts: adapters are attached once for each."""
    strengths = dict.fromkeys(prompt.strength for _, prompt in numbered)
    return [[(number, prompt) for number, prompt in numbered if prompt.strength == s] for s in strengths]


def name_image(number: int, prompt: Prompt, has_strength: bool) -> str:
    """Return the name of an image, with its strength if several are compared or if the prompt sets one."""
    strength = f"_{prompt.strength:g}" if has_strength or prompt.strength != 1 else ""
    return f"{number:02}{strength}_{prompt.seed}.png"


main = training_command(setup_parser, draw)

if __name__ == "__main__":
    sys.exit(main())
