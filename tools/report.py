"""Build the report of a run from its --log_events file (the HTML file that the run itself writes), or serve the
reports of a folder to a browser on this machine."""

import argparse
import logging
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.atomic_files import write_whole
from library.base.command_parser import make_parser
from library.base.errors import error_in
from library.checkpoints.overwriting import FileKind, check_target
from library.commands.command import command
from library.training.report_page.live import ReportServer
from library.training.report_page.page import report_kind
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report, read_events, read_report

EXAMPLES = """\
  python3 tools/report.py output/events.jsonl --output output/my_cat-report.html
  python3 tools/report.py output/my_cat --serve"""
logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("events", type=Path, help="file of --log_events; with --serve also a report, or a folder")
    parser.add_argument("--serve", action="store_true", help="serve the page, read-only, until Ctrl-C")
    parser.add_argument("--port", type=int, default=8123, help="port to serve on (default: 8123)")
    parser.add_argument("--output", type=Path, help="HTML file to write; unset: next to the events file, with its name")
    return parser


def make_report(args: argparse.Namespace) -> None:
    """Write or serve the report. Raises UserError for a file without events."""
    if args.serve:
        with ReportServer(args.events, args.port) as server:
            logger.info("open %s in a browser; Ctrl-C ends it", server.url)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        return
    path = args.output or args.events.with_name(f"{args.events.stem}-report.html")
    record = read_events(args.events)
    if record.is_empty:
        raise error_in(path=args.events)(f"{args.events} has no events", "use the file written by --log_events")
    kind = FileKind(f"{report_kind(record.name).name} with these events", partial(is_of_run, record))
    check_target("--output", path, kind, [args.events])
    write_whole(path, build_report(record))
    logger.info("wrote %s", path)


def is_of_run(record: Record, path: Path) -> bool:
    """Return True if a page is a report of the run of this record: of the same name, and with one of its starts."""
    if not report_kind(record.name).is_own(path):
        return False
    starts, others = ({session["time"] for session in each.sessions} for each in (record, read_report(path)))
    return not starts or not others or bool(starts & others)


main = command(setup_parser, make_report)

if __name__ == "__main__":
    sys.exit(main())
