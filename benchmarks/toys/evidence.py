"""Run experiments on the toy world with five seeds, and write their tables into benchmarks/RESULTS.md.

An experiment is a module of benchmarks/toys/experiments. Its docstring says what is compared, `COLUMNS` names the
figures, and `run(seed, folder)` maps the name of each row to its figures, 0 to 1, and may write into the folder. The
figures of a seed are kept in `<output>/<experiment>/seed_<seed>.json`, and not made again while this file exists.
"""

import argparse
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Protocol, cast

from benchmarks.results_page import PAGE, put_into
from benchmarks.toys.toy_files import write_text
from library.base.command_parser import make_parser
from library.base.errors import UserError
from library.commands.command import command

EXAMPLES = "  python3 -m benchmarks.toys evidence quickstart"
FOLDER = Path(__file__).parent / "experiments"
SEEDS = (1, 2, 3, 4, 5)


class Experiment(Protocol):
    __doc__: str
    COLUMNS: tuple[str, ...]
    run: Callable[[int, Path], dict[str, tuple[float, ...]]]


@dataclass(frozen=True)
class Figures:
    """The rows of an experiment for one seed, and the CPU time that they took."""

    rows: dict[str, tuple[float, ...]]
    cpu_seconds: float


def list_experiments() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def load_experiment(name: str) -> Experiment:
    return cast(Experiment, importlib.import_module(f"benchmarks.toys.experiments.{name}"))


def measure(experiment: Experiment, seed: int, folder: Path) -> Figures:
    """Run an experiment in `folder`/seed_<seed>, or read its figures from the file beside it."""
    file = folder / f"seed_{seed}.json"
    if not file.exists():
        place = folder / f"seed_{seed}"
        place.mkdir(parents=True, exist_ok=True)
        before = cpu_seconds()
        figures = Figures(experiment.run(seed, place), cpu_seconds() - before)
        write_text(file, json.dumps(asdict(figures), indent=1))
    return read_figures(file, experiment.COLUMNS)


def read_figures(file: Path, columns: Sequence[str]) -> Figures:
    """Raise UserError for a file that `measure` did not write for an experiment with these columns."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    match values:
        case {"rows": dict(rows), "cpu_seconds": int() | float() as cpu_seconds} if rows and all(
            is_row(row, len(columns)) for row in rows.values()
        ):
            return Figures(rows, cpu_seconds)
    raise UserError(
        f"{file} does not have the figures that this experiment writes ({', '.join(columns)}) and is kept: move it "
        "away, or name another folder with --output"
    )


def is_row(row: object, num_columns: int) -> bool:
    return isinstance(row, list) and len(row) == num_columns and all(isinstance(value, int | float) for value in row)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that ended."""
    return sum(os.times()[:4])


def describe(name: str, experiment: Experiment, figures: Sequence[Figures]) -> Iterator[str]:
    """Yield the lines of an experiment's section: the command, what is compared, and means over seeds."""
    hours = sum(of_seed.cpu_seconds for of_seed in figures) / 3600
    yield f"`python -m benchmarks.toys evidence {name}`, {hours:.2f} hours of CPU, one thread: the mean of the seeds"
    yield f"{', '.join(map(str, SEEDS))}, and its standard error."
    yield from ("", *experiment.__doc__.strip().splitlines(), "")
    yield f"| | {' | '.join(experiment.COLUMNS)} |"
    yield "|---|" + "---|" * len(experiment.COLUMNS)
    for row in figures[0].rows:
        cells = zip(*(of_seed.rows[row] for of_seed in figures), strict=True)
        yield f"| {row} | {' | '.join(map(cell, cells))} |"


def cell(values: Sequence[float]) -> str:
    """Return "72.3 ± 1.4 %", or "72.3 %" for values that are all equal."""
    error = 100 * stdev(values) / len(values) ** 0.5
    return f"{100 * mean(values):.1f}" + (f" ± {error:.1f} %" if error else " %")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("names", nargs="+", choices=list_experiments(), help="experiments to run")
    parser.add_argument("--output", type=Path, default=Path("output/evidence"), help="folder for what they write")
    return parser


def make_tables(args: argparse.Namespace) -> None:
    """Run and write each table when its seeds are done. Raise UserError for wrong files before the first of them."""
    folders = {name: args.output.resolve() / name for name in args.names}
    for name, folder in folders.items():
        for file in filter(Path.exists, (folder / f"seed_{seed}.json" for seed in SEEDS)):
            read_figures(file, load_experiment(name).COLUMNS)
    for name, folder in folders.items():
        experiment = load_experiment(name)
        figures = [measure(experiment, seed, folder) for seed in SEEDS]
        if len({tuple(of_seed.rows) for of_seed in figures}) > 1:
            raise UserError(f"{folder}/seed_*.json have different rows; delete those of an older version of {name}")
        lines = list(describe(name, experiment, figures))
        title = f"{name.replace('_', ' ').capitalize()} on the toy world"
        PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8"), name, lines, title), encoding="utf-8")
        print("\n".join(lines))


main = command(setup_parser, make_tables)
