"""Collect the captions or the tags of a folder of pictures in a metadata file, which datasets take as metadata_file and
training as --in_json.

What the file has of other pictures, and the other of the two fields, stays.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.files import atomic_path
from library.checkpoints.overwriting import FileType, check_overwrite
from library.data.description.image_extensions import image_extensions
from library.data.sources.folders.metadata_file import read_table
from library.errors import UserError
from library.options.encodings import decoded
from tools.command import check_place, make_parser, run

logger = logging.getLogger(__name__)

ENDINGS = {"caption": ".caption", "tags": ".txt"}  # by field of the file
TABLE_OF_TABLES = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*(\}|"(?!general")[^"]+"\s*:\s*\{)')  # no dataset file
METADATA = FileType("a metadata file", lambda start: TABLE_OF_TABLES.match(start) is not None)
EXAMPLES = """\
  python3 tools/captions_to_metadata.py pictures pictures.json --full_path --recursive --caption_extension .txt
  python3 tools/captions_to_metadata.py pictures pictures.json --full_path --recursive --field tags"""


def list_pictures(folder: Path, is_recursive: bool) -> list[Path]:
    """The pictures of a folder in the order of their paths. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    endings = image_extensions()
    entries = folder.rglob("*") if is_recursive else folder.iterdir()
    found = sorted(path for path in entries if path.suffix in endings and path.is_file())
    if not found:
        below = "" if is_recursive else "; --recursive with --full_path looks into the folders below it"
        raise UserError(f"{folder} has no pictures{below}")
    return found


def check_name(path: Path) -> None:
    """Raise UserError where a table would get the name of a file of lines, or cannot be written."""
    if path.suffix.lower() == ".jsonl":
        raise UserError(f"{path}: a table is written, not lines; give a name that ends in .json")
    check_place("out_json", path)
    check_overwrite("out_json", path, METADATA)


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a metadata file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(table, indent=2, ensure_ascii=False), encoding="utf-8")


def texts_of(pictures: Sequence[Path], extension: str) -> Iterator[tuple[Path, str | None]]:
    """Each picture with the text of its caption file, None where there is none. Raises UserError."""
    for picture in pictures:
        file = picture.with_suffix(extension)
        yield picture, decoded(file.read_bytes(), str(file)).strip() if file.is_file() else None


def key_of(picture: Path, is_full: bool) -> str:
    return str(picture) if is_full else picture.stem


def check_keys(pictures: Sequence[Path], is_full: bool) -> None:
    """Raise UserError where two pictures have one key."""
    seen: dict[str, Path] = {}
    for picture in pictures:
        other = seen.setdefault(key_of(picture, is_full), picture)
        if other is not picture:
            raise UserError(f"{other} and {picture} have one key, {picture.stem}; give --full_path, or rename one")


def collect(args: argparse.Namespace) -> None:
    """Read the files and write the table."""
    if args.recursive and not args.full_path:
        raise UserError("--recursive needs --full_path: names alone do not tell the pictures of several folders apart")
    check_name(args.out_json)
    extension = args.caption_extention or args.caption_extension or ENDINGS[args.field]
    source = args.in_json or (args.out_json if args.out_json.is_file() else None)
    table = read_table(str(source)) if source is not None else {}
    pictures = list_pictures(args.train_data_dir, args.recursive)
    check_keys(pictures, args.full_path)
    missing: list[Path] = []
    for picture, text in texts_of(pictures, extension):
        if text is None:
            missing.append(picture)
        else:
            table.setdefault(key_of(picture, args.full_path), {})[args.field] = text
    if len(missing) == len(pictures):
        raise UserError(f"none of the {len(pictures)} pictures has a {extension} file; give --caption_extension")
    if missing:
        logger.warning(
            "%d of %d pictures have no %s file and get no %s, the first is %s",
            len(missing), len(pictures), extension, args.field, os.fspath(missing[0]),
        )  # fmt: skip
    write_table(args.out_json, table)
    print(f"{args.out_json}: {args.field} of {len(pictures) - len(missing)} pictures, {len(table)} entries")


def setup_parser(field: str = "caption") -> argparse.ArgumentParser:
    """The command's options; `field` is the default of --field."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("train_data_dir", type=Path, help="the folder of the pictures")
    parser.add_argument("out_json", type=Path, help="the metadata file to write; what it has is kept")
    parser.add_argument("--in_json", type=Path, help="read this metadata file first, instead of the one to write")
    parser.add_argument("--field", choices=tuple(ENDINGS), default=field, help=f"what to collect (default: {field})")
    parser.add_argument("--caption_extension", help="ending of the files; unset: .caption, and .txt for tags")
    parser.add_argument("--caption_extention", help="an older spelling of --caption_extension")
    parser.add_argument("--full_path", action="store_true", help="name pictures by their paths, not by names alone")
    parser.add_argument("--recursive", action="store_true", help="look into the folders below too")
    parser.add_argument("--debug", action="store_true", help="has no effect: what is missing is always said")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), collect, argv)


if __name__ == "__main__":
    sys.exit(main())
