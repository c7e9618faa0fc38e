"""Install this suite into a front end in place of its sd-scripts; --restore undoes this.

Supports kohya_ss, LoRA_Easy_Training_Scripts, fluxgym, lora-scripts, and any other front end with an `sd-scripts`
folder.
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.specs import list_specs
from library.errors import UserError
from tools.command import command, make_parser

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sd-scripts", "sd_scripts", "backend/sd_scripts", "scripts/stable", "scripts/dev")  # where front ends look
FILES = ("*.py", "*.txt", "pyproject.toml", "LICENSE", "README.md")
PACKAGES = ("configs", "docs", "finetune", "library", "networks", "tools")
ENVIRONMENTS = ("venv", ".venv")  # LoRA_Easy keeps its environment in the scripts' folder
KEPT = ".original"  # suffix of the front end's own scripts

WHOLE = "trains every weight of a model, but this suite trains only adapters. Use {own}, or sd-scripts"
OTHER = "{what}, which this suite does not support. Use sd-scripts"
INVERSION = OTHER.format(what="trains a word of the text encoder (textual inversion)")
CONTROL = OTHER.format(what="trains a ControlNet")
TAGGER = OTHER.format(what="writes captions")
PREFIXES = sorted(spec.script.removesuffix("train_network.py") for spec in list_specs())
ABSENT = {
    **{f"{prefix}train.py": WHOLE.format(own=f"{prefix}train_network.py") for prefix in PREFIXES if prefix},
    **dict.fromkeys(("train_db.py", "fine_tune.py"), WHOLE.format(own="train_network.py")),
    **{f"{prefix}train_textual_inversion.py": INVERSION for prefix in PREFIXES},
    **{f"{prefix}train_control_net{ending}.py": CONTROL for prefix in PREFIXES for ending in ("", "_lllite")},
    **{
        f"finetune/{name}.py": TAGGER for name in ("make_captions", "make_captions_by_git", "tag_images_by_wd14_tagger")
    },
}
"""Scripts of sd-scripts that front ends start and this suite lacks, with the message that each one exits with."""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        __doc__, "  python3 tools/front_end.py ../kohya_ss\n  python3 tools/front_end.py ../kohya_ss --restore"
    )
    parser.add_argument("folder", type=Path, help="folder of the front end")
    parser.add_argument("--restore", action="store_true", help="put the front end's own scripts back")
    return parser


def install(args: argparse.Namespace) -> None:
    """Install or restore. Raises UserError if the folder is not a front end."""
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder; use the folder of the front end")
    if ROOT.is_relative_to(args.folder.resolve()) and not args.restore:
        raise UserError(f"{args.folder} contains this suite; clone the suite next to the front end and run it there")
    folders = [args.folder / name for name in FOLDERS if (args.folder / name).is_dir()]
    if not folders:
        raise UserError(
            f"{args.folder} has none of the folders {', '.join(FOLDERS)}; is it a front end for sd-scripts?"
        )
    for folder in folders:
        original = folder.with_name(folder.name + KEPT)
        if args.restore:
            restore(folder, original)
        elif original.exists():
            copy_to(folder)
            remove_old_modules(folder / "library")
            logger.info("updated %s", folder)
        else:
            # Copied to a new folder first: if the copy fails, the front end still has its own scripts.
            new = folder.with_name(f"{folder.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            copy_to(new)
            replace(folder, new, original)
            logger.info("installed into %s; the front end's own scripts are in %s", folder, original)


def copy_to(place: Path) -> None:
    """Copy the suite, and write placeholders for the scripts that it lacks."""
    for source in (path for pattern in (*FILES, *PACKAGES) for path in ROOT.glob(pattern)):
        if source.is_dir():
            shutil.copytree(
                source, place / source.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place / source.name)
    requirements = place / "requirements.txt"
    # Front ends install torch for the user's GPU first, and `pip install -U` would replace it, so torch is dropped
    # here. LoRA_Easy imports `library` from its own folder, so the suite is installed too, as sd-scripts does.
    lines = [line for line in requirements.read_text("utf-8").splitlines(True) if not line.startswith("torch>=")]
    requirements.write_text("".join([*lines, "-e .\n"]), encoding="utf-8")
    for name, sentence in ABSENT.items():
        text = f'"""Written by tools/front_end.py."""\n\nraise SystemExit({f"{name} {sentence}"!r})\n'
        (place / name).write_text(text, encoding="utf-8")


def remove_old_modules(library: Path) -> None:
    """Delete modules that an earlier version of the suite had. Modules in other packages may be the user's own."""
    # The modules of some folders are choices of an option, so an old one would still be offered.
    for path in library.rglob("*.py"):
        if not (ROOT / "library" / path.relative_to(library)).exists():
            path.unlink()


def replace(place: Path, new: Path, original: Path) -> None:
    """Replace a folder by `new` and keep it as `original`; its virtual environments stay in place."""
    place.rename(original)
    new.rename(place)
    move_environments(original, place)


def restore(place: Path, original: Path) -> None:
    """Put the front end's own folder back. Raises UserError if nothing was installed."""
    if not original.is_dir():
        raise UserError(f"{original} is missing, so nothing was installed into {place}")
    move_environments(place, original)
    shutil.rmtree(place)
    original.rename(place)
    logger.info("restored %s", place)


def move_environments(source: Path, target: Path) -> None:
    """Move virtual environments between folders that swap names, because their files contain their own path."""
    for name in ENVIRONMENTS:
        if (source / name).is_dir():
            (source / name).rename(target / name)


main = command(setup_parser, install)

if __name__ == "__main__":
    sys.exit(main())
