"""Compare the time that train.py plans with the clock, for ten runs on this machine: 5, 12 and 40 photos with the toy
of the quickstart, tiny models of SDXL's and of FLUX.1's layout, and 80 photos, of which some only measure."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from unittest.mock import patch

import numpy as np
from PIL import Image

import train
from library.base.command_parser import make_parser
from library.base.formatting import align_columns
from library.base.terminal import print_line
from library.commands.command import command
from library.train_photos import session, training
from library.train_photos.plan import Plan
from tests.tiny.bases import BASES

TOY = Path(__file__).parents[1] / "configs" / "quickstart" / "toy_base"
RUNS = [*((base, number) for base in ("quickstart", "sdxl", "flux") for number in (5, 12, 40)), ("quickstart", 80)]
EXAMPLES = "  python3 -m benchmarks run_duration --steps 60"


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--steps", type=int, default=100, help="length of each run (default: 100)")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the runs, from 1; unset: all")
    return parser


def write_photos(folder: Path, number: int) -> Path:
    folder.mkdir()
    for seed in range(number):
        values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((96, 96), Image.Resampling.NEAREST).save(folder / f"{seed:03}.png")
    return folder


def measure(base: str, number: int, steps: int, folder: Path) -> tuple[float, float]:
    """Return the planned and the measured seconds of a run, from the answer to "Train?" to its end."""
    seconds: list[tuple[float, float]] = []

    def train_timed(plan: Plan, *others: object) -> int:
        began, status = monotonic(), training.train(plan, *others)  # type: ignore[arg-type]
        seconds.append((0.0 if plan.duration is None else plan.duration.seconds, monotonic() - began))
        return status

    words = [] if base == "quickstart" else BASES[base].build(folder / "base")
    path = words[words.index("--pretrained_model_name_or_path") + 1] if words else str(TOY)
    photos = write_photos(folder / "photos", number)
    arguments = [str(photos), "--base", path, "--trigger", "mycat, a cat", "--steps", str(steps), "--prediction"]
    with patch.object(session, "train", train_timed):
        status = train.main([*arguments, "epsilon", "--output_dir", str(folder / "out"), "--name", "mine", "--yes"])
    assert status == 0, f"{base}: see {folder / 'out'}"
    return seconds[0]


def list_rows(args: argparse.Namespace) -> Iterator[list[str]]:
    yield ["base", "photos", "planned", "measured", "measured / planned"]
    for number in args.only or range(1, len(RUNS) + 1):
        base, num_photos = RUNS[number - 1]
        with TemporaryDirectory() as folder:
            planned, measured = measure(base, num_photos, args.steps, Path(folder))
        row = [base, str(num_photos), f"{planned:.0f} s", f"{measured:.0f} s", f"{measured / planned:.2f}"]
        print_line(" ".join(row), sys.stderr)
        yield row


def compare(args: argparse.Namespace) -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rows = list(list_rows(args))
    print_line("\n".join([*align_columns(rows), f"load of the machine at the start: {load:.1f}"]))


main = command(setup_parser, compare)
