"""Collect the captions or tags of an image folder in a metadata file, for metadata_file in a dataset file or --in_json
in training.

Existing entries of other images, and the other of the two fields, are kept.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.atomic_files import write_whole
from library.base.command_parser import make_parser
from library.base.errors import about, error_in, of_file
from library.base.terminal import print_line
from library.checkpoints.marks import digest_text, mark_of
from library.checkpoints.overwriting import FileKind, check_target, known_by_start
from library.commands.command import check_place, command
from library.data.description.image_extensions import describe_unread, image_extensions
from library.data.sources.folders.metadata_file import read_table
from library.options.encodings import decode_utf8

logger = logging.getLogger(__name__)

WRITER = "tools/captions_to_metadata.py"
ENDINGS = {"caption": ".caption", "tags": ".txt"}  # by field of the metadata file
TABLE_OF_TABLES = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*(\}|"(?!general")[^"]+"\s*:\s*\{)')  # not a dataset file
METADATA = known_by_start("a metadata file", lambda start: TABLE_OF_TABLES.match(start) is not None)
EXAMPLES = """\
  python3 tools/captions_to_metadata.py pictures pictures.json --full_path --recursive --caption_extension .txt
  python3 tools/captions_to_metadata.py pictures pictures.json --full_path --recursive --field tags"""


def list_images(folder: Path, is_recursive: bool) -> list[Path]:
    """List the images of a folder, sorted by path. Raises UserError if there are none."""
    if not folder.is_dir():
        raise of_file(folder)("is not a folder")
    endings = image_extensions()
    entries = sorted(folder.rglob("*") if is_recursive else folder.iterdir())
    images = [path for path in entries if path.suffix in endings and path.is_file()]
    if not images:
        hint = "" if is_recursive else "; --recursive with --full_path searches its subfolders"
        raise of_file(folder, cause="missing")(f"has no images{hint}{describe_unread(path.name for path in entries)}")
    return images


def check_name(path: Path) -> None:
    """Raise UserError if the name ends in .jsonl, or the file cannot be written."""
    if path.suffix.lower() == ".jsonl":
        raise of_file(path)(": the metadata file is a JSON object, not JSON lines", "use a name that ends in .json")
    # No inputs are passed: as in sd-scripts, several calls may collect into one file, which is then also read.
    check_place("out_json", path, METADATA)


def check_table(path: Path, table: Mapping[str, Any], writer: str, source: Path | None) -> None:
    """Raise UserError if `table` would replace texts or images of a metadata file that is neither the `source` of the
    table nor, unchanged, what `writer` wrote there."""
    name = f"a metadata file with these texts, or one that {writer} wrote, unchanged"
    kind = FileKind(name, lambda path: is_own_table(path, table, writer))
    if source is None or not (path.exists() and path.samefile(source)):
        check_target("out_json", path, kind)


def is_own_table(path: Path, new: Mapping[str, Any], writer: str) -> bool:
    """Return True if `new` has all images of a metadata file, and all its values unless the command wrote these."""
    old = read_table(str(path))
    is_unchanged = path.read_text(encoding="utf-8").endswith(mark_table(old, writer, path))
    return all(
        key in new and (is_unchanged or all(new[key].get(field) == value for field, value in entry.items()))
        for key, entry in old.items()
    )


def mark_table(table: Mapping[str, Any], writer: str, path: Path) -> str:
    """Return a digest of a table, its writer and its name as white space: every entry of the file is an image, and
    other programs read all of them."""
    digest = digest_text(mark_of(writer, path) + json.dumps(table, sort_keys=True))
    return "\n" + f"{int(digest, 16):0128b}".translate({ord("0"): " ", ord("1"): "\t"}) + "\n"


def write_table(path: Path, table: dict[str, Any], writer: str, source: Path | None) -> None:
    """Write a metadata file atomically, with its mark. Raises UserError as `check_table` does."""
    check_table(path, table, writer, source)
    text = json.dumps(table, indent=2, ensure_ascii=False) + mark_table(table, writer, path)
    write_whole(path, text)


def read_captions(images: Sequence[Path], extension: str) -> Iterator[tuple[Path, str | None]]:
    """Yield each image with the text of its caption file, None if it has none. Raises UserError for invalid UTF-8."""
    for image in images:
        file = image.with_suffix(extension)
        yield image, decode_utf8(file.read_bytes(), str(file)).strip() if file.is_file() else None


def image_key(image: Path, is_full: bool) -> str:
    return str(image) if is_full else image.stem


def check_keys(images: Sequence[Path], is_full: bool) -> None:
    """Raise UserError if two images have the same key."""
    seen: dict[str, Path] = {}
    for image in images:
        other = seen.setdefault(image_key(image, is_full), image)
        if other is not image:
            raise error_in("--full_path", path=image, cause="would be lost")(
                f"{other} and {image} have the same key, {image.stem}", "use --full_path, or rename one"
            )


def collect(args: argparse.Namespace) -> None:
    """Read the captions and write the metadata file."""
    if args.recursive and not args.full_path:
        raise about("--recursive", cause="needs")(
            "requires --full_path: file names alone do not distinguish images of several folders"
        )
    check_name(args.out_json)
    extension = args.caption_extention or args.caption_extension or ENDINGS[args.field]
    source = args.in_json or (args.out_json if args.out_json.is_file() else None)
    table = read_table(str(source)) if source is not None else {}
    images = list_images(args.train_data_dir, args.recursive)
    check_keys(images, args.full_path)
    missing: list[Path] = []
    for image, text in read_captions(images, extension):
        if text is None:
            missing.append(image)
        else:
            table.setdefault(image_key(image, args.full_path), {})[args.field] = text
    if len(missing) == len(images):
        raise error_in("--caption_extension", cause="missing")(
            f"none of the {len(images)} images has a {extension} file", "set --caption_extension"
        )
    if missing:
        logger.warning(
            "%d of %d images have no %s file and get no %s; the first is %s",
            len(missing), len(images), extension, args.field, os.fspath(missing[0]),
        )  # fmt: skip
    write_table(args.out_json, table, WRITER, args.in_json)
    print_line(f"{args.out_json}: {args.field} of {len(images) - len(missing)} images, {len(table)} entries")


def setup_parser(field: str = "caption") -> argparse.ArgumentParser:
    """Return the command's options; `field` is the default of --field."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("train_data_dir", type=Path, help="the folder of images")
    parser.add_argument("out_json", type=Path, help="the metadata file to write; existing entries are kept")
    parser.add_argument("--in_json", type=Path, help="read this metadata file first, instead of the one to write")
    parser.add_argument("--field", choices=tuple(ENDINGS), default=field, help=f"what to collect (default: {field})")
    parser.add_argument("--caption_extension", help="extension of the files; unset: .caption, and .txt for tags")
    parser.add_argument("--caption_extention", help="old spelling of --caption_extension")
    parser.add_argument("--full_path", action="store_true", help="use paths of images as keys, not names")
    parser.add_argument("--recursive", action="store_true", help="also search subfolders")
    parser.add_argument("--debug", action="store_true", help="has no effect: missing files are always reported")
    return parser


main = command(setup_parser, collect)

if __name__ == "__main__":
    sys.exit(main())
