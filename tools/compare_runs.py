"""Compare runs on one HTML page: different options, data and versions, losses on common axes, previews side by side.
A run is given as its folder, its report, or the file that --log_events wrote. With --rank, print which of the runs in a
folder have significantly higher losses on the same held-out images."""

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.atomic_files import write_whole
from library.base.command_parser import make_parser
from library.base.errors import error_in
from library.base.terminal import print_line
from library.checkpoints.overwriting import check_target
from library.commands.command import command
from library.training.report_page.comparison import build_comparison
from library.training.report_page.page import COMPARISON, same_title
from library.training.sweep.ranked_reports import rank_reports
from library.training.sweep.ranking import format_ranking

logger = logging.getLogger(__name__)

EXAMPLE = """  python3 tools/compare_runs.py output/cat_rank8 output/cat_rank32 --output output/ranks.html
  python3 tools/compare_runs.py --rank output/sweep"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("runs", type=Path, nargs="*", help="folders, reports, or event files; two or more")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="HTML file (default: %(default)s)")
    parser.add_argument("--rank", type=Path, metavar="FOLDER", help="rank the runs whose reports are in this folder")
    return parser


def compare(args: argparse.Namespace) -> None:
    """Write the page, or print the ranking. Raises UserError for a run that cannot be read."""
    if args.rank is not None:
        if args.runs:
            raise error_in("--rank")("--rank takes a folder, and no other runs", "leave one of them out")
        rank(args.rank)
        return
    check_target("--output", args.output, COMPARISON, [path for path in args.runs if path.is_file()])
    page = build_comparison(args.runs)
    check_target("--output", args.output, same_title("a comparison of these runs", page))
    write_whole(args.output, page)
    logger.info("wrote %s", args.output)


def rank(folder: Path) -> None:
    """Print a folder's runs by their loss."""
    ranking, warnings = rank_reports(folder)
    for line in warnings:
        logger.warning("%s", line)
    print_line("\n".join([*format_ranking(ranking), ranking.verdict]))


main = command(setup_parser, compare)

if __name__ == "__main__":
    sys.exit(main())
