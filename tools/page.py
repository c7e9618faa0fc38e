"""Open a page in the browser to choose photos and a base model, train and watch. Only this machine can reach it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from library.base.command_parser import make_parser
from library.base.errors import error_in

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """\
  python3 tools/start.py page
  python3 tools/start.py page --port 9000 --no_browser
  python3 tools/start.py page --listen 0.0.0.0"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--folder", type=Path, default=ROOT, help="trainings go to output in it (default: this suite)")
    parser.add_argument("--port", type=int, help="port of the page (default: 8189, or a free one)")
    parser.add_argument(
        "--listen", metavar="ADDRESS", help="let other machines in that have the token; without encryption"
    )
    parser.add_argument("--no_browser", action="store_true", help="print the address, and open no browser")
    return parser


def open_page(args: argparse.Namespace) -> int:
    """Serve the page. Raises UserError without its packages."""
    try:
        from library.page.server import serve
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn", "jinja2", "h11"):
            raise
        raise error_in("page", cause="not installed")(
            f"the page needs the package {package}; `python3 tools/start.py page` installs it"
        ) from None
    return serve(args.folder, args.port, args.listen, not args.no_browser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    from library.commands.exit_status import act

    args = setup_parser().parse_args(argv)
    return act(lambda: open_page(args), argv)


if __name__ == "__main__":
    sys.exit(main())
