"""Install this suite into a front end in place of its sd-scripts; --restore undoes this.

Supports kohya_ss, LoRA_Easy_Training_Scripts, fluxgym, lora-scripts, LoRA Forge, musubi-tuner, and any other front end
with an `sd-scripts` or `musubi-tuner` folder. Needs only Python's standard library. Files of yours in these folders are
kept.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    NEEDS_PACKAGES = False  # read by library/environment/requirements.py

from library.base.command_parser import make_parser
from library.base.error_lines import fail
from library.base.errors import UserError, error_in
from library.base.terminal import EscapedTexts, print_line
from library.base.version import VERSION
from library.front_ends.journal import compare_with_journal, read_journal
from library.front_ends.layouts import FOLDERS, MUSUBI_FOLDERS, ROOT, Layout, find_layouts
from library.front_ends.place import install, restore
from library.front_ends.submodule import NONE, find_submodule, read_update

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python3 tools/front_end.py ../kohya_ss
  python3 tools/front_end.py ../kohya_ss --check
  python3 tools/front_end.py ../kohya_ss --restore"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("folder", type=Path, help="folder of the front end")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--restore", action="store_true", help="put the front end's own scripts back")
    action.add_argument("--check", action="store_true", help="compare what is installed with the journal")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Install, check or restore. Return the exit status: 0 success, 1 an error or a difference, 130 interrupted."""
    args = setup_parser().parse_args(argv)
    handler = logging.StreamHandler()
    handler.addFilter(EscapedTexts())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        if ROOT.is_relative_to(args.folder.resolve()) and not (args.restore or args.check):
            raise error_in("folder", path=args.folder)(
                f"{args.folder} contains this suite", "clone the suite next to the front end and run it there"
            )
        if (args.folder / "tools" / "front_end.py").is_file() and not (args.restore or args.check):
            raise error_in("folder", path=args.folder)(
                f"{args.folder} is a copy of this suite", "give the folder of the front end"
            )
        layouts = require_layouts(args.folder)
        if args.check:
            return check(args.folder, layouts)
        for layout in layouts if not args.restore else find_installed(args.folder, layouts):
            change(layout, args.folder, args.restore)
    except (UserError, OSError) as error:
        return fail(error, argv)
    except KeyboardInterrupt:
        print_line("stopped; run the same command again to continue, or --restore to undo it", sys.stderr)
        return 130
    return 0


def require_layouts(front_end: Path) -> list[Layout]:
    """Return the folders of scripts in a front end. Raises UserError if there are none."""
    if not front_end.is_dir():
        raise error_in("folder", path=front_end)(f"{front_end} is not a folder", "use the folder of the front end")
    layouts = find_layouts(front_end)
    if not layouts:
        names = ", ".join((*FOLDERS, *MUSUBI_FOLDERS))
        raise error_in("folder", path=front_end)(
            f"{front_end} has none of the folders {names}; is it a front end for sd-scripts?"
        )
    return layouts


def find_installed(front_end: Path, layouts: Sequence[Layout]) -> list[Layout]:
    """Return the folders that this suite was installed into. Raises UserError if there are none."""
    installed = [layout for layout in layouts if layout.place.journal.exists()]
    if not installed:
        for layout in layouts:
            restore(layout.place, None)  # says what is missing
    return installed


def change(layout: Layout, front_end: Path, restores: bool) -> None:
    place, submodule = layout.place, find_submodule(layout.folder, front_end)
    if restores:
        restore(place, submodule)
        logger.info("restored %s", layout.folder)
        return
    is_update = install(place, layout.list_contents(), VERSION, not layout.is_musubi, submodule)
    where = f"; the front end's own files are in {place.original}" if place.original.is_dir() else ""
    logger.info("%s %s%s", "updated" if is_update else "installed into", layout.folder, where)
    if submodule is not None:
        logger.info("git submodule update skips %s in %s until --restore", submodule.name, submodule.repository)


def check(front_end: Path, layouts: Sequence[Layout]) -> int:
    """Compare each folder with its journal. Return 1 if one differs, or git would replace it."""
    status = 0
    for layout in find_installed(front_end, layouts):
        journal = read_journal(layout.place)
        assert journal is not None, "find_installed looks for the journal"
        problem = str(compare_with_journal(layout.place, journal))
        submodule = find_submodule(layout.folder, front_end)
        if not problem and submodule is not None and read_update(submodule) != NONE:
            problem = f"git submodule update would replace it: {submodule.setting} is no longer {NONE}"
        if problem:
            status = 1
            logger.warning("%s is not as installed: %s", layout.folder, problem)
            logger.warning("  -> python3 tools/front_end.py %s installs it again and keeps your files", front_end)
        else:
            logger.info("%s is as installed: lora-training-suite %s", layout.folder, journal.version)
    return status


if __name__ == "__main__":
    sys.exit(main())
