"""Build the report of a run from its --log_events file: the same HTML file that the run writes itself."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.overwriting import check_overwrite
from library.errors import UserError
from library.training.report_page.page import REPORT
from library.training.report_page.writer import read_events, report_of, write_page
from tools.command import make_parser, run

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "  python3 tools/report.py output/events.jsonl --output output/my_cat-report.html")
    parser.add_argument("events", type=Path, help="file that --log_events wrote")
    parser.add_argument("--output", type=Path, help="HTML file to write; unset: named like the events file, beside it")
    return parser


def make_report(args: argparse.Namespace) -> None:
    """Write the report. Raises UserError for a file without events."""
    path = args.output or args.events.with_name(f"{args.events.stem}-report.html")
    check_overwrite("--output", path, REPORT, [args.events])
    record = read_events(args.events)
    if record.is_empty:
        raise UserError(f"{args.events} has no events; use the file written by --log_events")
    write_page(path, report_of(record))
    logger.info("wrote %s", path)


def main(argv: Sequence[str] | None = None) -> int:
    return run(setup_parser(), make_report, argv)


if __name__ == "__main__":
    sys.exit(main())
