"""Show the metadata of a .safetensors file: training settings, model description, most frequent tags.

The values are only shown, never executed. JSON values are formatted, all others are printed unchanged.
"""

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.json_text import parse_json
from library.base.terminal import escape_controls, print_line
from library.checkpoints.files import file_in_folder
from library.checkpoints.headers import holds_safetensors, read_header, require_weight_file
from library.commands.command import add_file, command

TAG_KEY = "ss_tag_frequency"
TIME_KEYS = ("ss_training_started_at", "ss_training_finished_at")
LONGEST_TEXT = 2000  # characters of a value; longer ones, such as embedded images, are cut
SECTIONS = (("modelspec.", "model"), ("ss_", "training"), ("sshs_", "hashes"))

EXAMPLES = """\
  python3 tools/show_metadata.py --model my_cat.safetensors
  python3 tools/show_metadata.py --model my_cat.safetensors --key ss_network_args
  python3 tools/show_metadata.py --model my_cat.safetensors --json > metadata.json"""


def parse_value(text: str) -> Any:
    """Parse a JSON object or list; return any other text unchanged."""
    if not text.startswith(("{", "[")):
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text


def format_metadata(metadata: Mapping[str, str], num_tags: int) -> Iterator[str]:
    """Yield all keys by section, short values on one line each."""
    if not metadata:
        yield "the file has no metadata"
    shown = set()
    for prefix, title in (*SECTIONS, ("", "other")):
        keys = sorted(key for key in metadata if key.startswith(prefix) and key not in shown)
        shown.update(keys)
        if keys:
            yield f"{title}:"
            for key in keys:
                yield from format_entry(key, metadata[key], num_tags)


def format_entry(key: str, text: str, num_tags: int) -> Iterator[str]:
    """Yield the lines of one key, with JSON indented below it."""
    value = parse_value(text)
    if key == TAG_KEY and isinstance(value, dict):
        yield f"  {escape_controls(key)}:"
        yield from (f"    {line}" for line in list_tags(value, num_tags))
    elif isinstance(value, (dict, list)) and value:
        yield f"  {escape_controls(key)}:"
        yield from (
            f"    {escape_controls(line)}" for line in json.dumps(value, indent=2, ensure_ascii=False).split("\n")
        )
    else:
        yield f"  {escape_controls(key)}: {escape_controls(shorten(text))}{format_time(key, text)}"


def list_tags(frequencies: Mapping[str, Any], num_tags: int) -> Iterator[str]:
    """Yield the most frequent tags over all folders, then the number of the others."""
    counts: Counter[str] = Counter()
    for tags in frequencies.values():
        if isinstance(tags, dict):
            counts.update({str(tag): count for tag, count in tags.items() if isinstance(count, int)})
    yield from (f"{count:6} {escape_controls(tag)}" for tag, count in counts.most_common(num_tags))
    if len(counts) > num_tags:
        yield f"and {len(counts) - num_tags} more; --num_tags {len(counts)} shows all"


def format_time(key: str, text: str) -> str:
    """Return a Unix time as a date in brackets; "" for other keys."""
    if key not in TIME_KEYS:
        return ""
    try:
        return f" ({datetime.fromtimestamp(float(text), timezone.utc):%Y-%m-%d %H:%M:%S} UTC)"
    except (ValueError, OverflowError, OSError):
        return ""


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:80]}... ({len(text)} characters)"


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    add_file(parser, "a .safetensors file")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, with nested JSON unpacked")
    parser.add_argument("--key", help="print only this value, unchanged")
    parser.add_argument("--num_tags", type=int, default=20, help="tags to list")
    return parser


def show(path: Path, key: str | None, is_json: bool, num_tags: int) -> Iterator[str]:
    """Yield the lines to print. Raises UserError for a file or key that cannot be shown."""
    path = file_in_folder(path, f"--model {path}")
    if not path.is_file():
        raise about("--model", path, cause="missing")("does not exist")
    require_weight_file(path)
    if not holds_safetensors(path):
        raise about("--model", path)(": only safetensors files have metadata")
    metadata = read_header(path).metadata
    if key is not None:
        if key not in metadata:
            raise about("--key")(f"{key}: the file has no such key; it has {', '.join(sorted(metadata)) or 'none'}")
        metadata = {key: metadata[key]}
    if is_json:
        yield json.dumps({k: parse_value(text) for k, text in metadata.items()}, indent=2, ensure_ascii=False)
    elif key is not None:
        yield metadata[key]
    else:
        yield from format_metadata(metadata, num_tags)


def print_metadata(args: argparse.Namespace) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a Windows console may lack a character
        sys.stdout.reconfigure(errors="backslashreplace")
    for line in show(args.model or args.file, args.key, args.json, args.num_tags):
        print_line(line)


main = command(setup_parser, print_metadata)

if __name__ == "__main__":
    sys.exit(main())
