"""Clean the tags and captions of drawings in a metadata file, as taggers and captioning models write them.

Tags: underscores become spaces; ratings are removed, and so are tags contained in a longer one ("shirt" next to "white
shirt"). If there are several people, repeated tags for hair, eyes, sleeves and hairstyles are removed, because they do
not tell which person they describe. Captions: "a cartoon lady" and similar terms become "a girl".
"""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.command_parser import make_parser
from library.base.terminal import print_line
from library.commands.command import command
from library.data.sources.folders.metadata_file import read_table
from tools.captions_to_metadata import check_name, write_table

logger = logging.getLogger(__name__)

HAIR_LENGTH = re.compile(r"(long|short|medium) hair")
HAIR = re.compile(r"[\w-]+ hair")
OF_ONE_PERSON = (
    HAIR_LENGTH,
    re.compile(r"(bob|hime) cut"),
    re.compile(r"[\w-]+ eyes"),
    re.compile(r"[\w-]+ sleeves|sleeveless"),
    re.compile(
        r"ponytail|braid|ahoge|twintails|sidelocks|two side up|two tails|[\w-]+ braid|[\w-]+ bun|single (hair|side) bun"
    ),
)
REPEATABLE = re.compile(r"[\w-]+|hair ornament")  # tags that a longer tag can repeat
UNDERSCORE = re.compile(r"(?<!\^)_|_(?!\^)")  # any underscore except the one in the emoticon ^_^

DRAWN, PEOPLE = "(?:anime|cartoon)", "(?:lady|female|woman|person)"
CAPTION_RULES = tuple(
    (re.compile(rf"\b{pattern}"), new)
    for pattern, new in (
        (r"anime anime\b", "anime"),
        (r"young ", ""),
        (rf"{DRAWN} women\b", "girls"),
        (rf"{DRAWN} (?:girl|character|{PEOPLE})(s?)\b", r"girl\1"),
        (r"(?:women|people)\b", "girls"),
        (rf"{PEOPLE}(s?)\b", r"girl\1"),
        (r"a cartoon figure(s?)\b", r"a figure\1"),
        (r"(?:a cartoon|an anime cartoon) (image|picture)\b", r"a \1"),
        (r"a cartoon (?:anime )?drawing\b", "a drawing"),
        (r"girl girl\b", "girl"),
        (r"an girl", "a girl"),
        (r"a image\b", "an image"),
    )
)
WRITER = "tools/clean_metadata.py"
EXAMPLES = """\
  python3 tools/clean_metadata.py pictures.json pictures_clean.json"""


def clean_tags(text: str) -> str:
    """Return the tags worth training on, separated by commas."""
    tags = [tag.strip() for tag in UNDERSCORE.sub(" ", text).split(",") if tag.strip()]
    # As in sd-scripts, everything from the rating on is cut: DeepDanbooru writes it after the tags.
    end = next((i for i, tag in enumerate(tags) if i and tag.startswith("rating")), len(tags))
    tags = tags[:end]
    if any("girls" in tag or "boys" in tag for tag in tags):
        tags = drop_attributes(tags)
    repeated = [tag for tag in tags if REPEATABLE.fullmatch(tag) and any(extends_tag(other, tag) for other in tags)]
    return ", ".join(tag for tag in tags if tag not in repeated)


def extends_tag(other: str, tag: str) -> bool:
    """Return True if `other` is `tag` preceded by one or more words."""
    return re.fullmatch(rf"(\w+ )+{re.escape(tag)}", other) is not None


def drop_attributes(tags: Sequence[str]) -> list[str]:
    """Remove ambiguous attributes if there are several people; all may share a single hair length, which is kept."""
    kept = list(tags)
    for pattern in OF_ONE_PERSON:
        matches = [tag for tag in kept if pattern.fullmatch(tag)]
        if len(matches) > 1:
            kept = [tag for tag in kept if tag not in matches]
    colours = [tag for tag in kept if HAIR.fullmatch(tag) and not HAIR_LENGTH.fullmatch(tag)]
    return [tag for tag in kept if tag not in colours] if len(colours) > 1 else kept


def clean_caption(text: str) -> str:
    """Replace terms for drawn people by "girl"; each rule is applied until it changes nothing."""
    for pattern, new in CAPTION_RULES:
        while (changed := pattern.sub(new, text)) != text:
            text = changed
    return text


CLEANERS: dict[str, Callable[[str], str]] = {"tags": clean_tags, "caption": clean_caption}


def clean(args: argparse.Namespace) -> None:
    if args.old_out_json is not None:  # older form of this command, which has a folder before the two files
        logger.warning("%s has no effect: all entries of the metadata file are cleaned", args.in_json)
        args.in_json, args.out_json = args.out_json, args.old_out_json
    check_name(args.out_json)
    table = read_table(str(args.in_json))
    num_changed = 0
    for field, cleaner in CLEANERS.items():
        entries = [entry for entry in table.values() if entry.get(field) is not None]
        if len(entries) < len(table):
            logger.warning("%d of %d entries have no %s", len(table) - len(entries), len(table), field)
        for entry in entries:
            old, entry[field] = entry[field], cleaner(entry[field])
            num_changed += old != entry[field]
            if args.debug and old != entry[field]:
                print_line(f"{old}\n  -> {entry[field]}")
    write_table(args.out_json, table, WRITER, args.in_json)
    print_line(f"{args.out_json}: {num_changed} texts changed in {len(table)} entries")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("in_json", type=Path, help="the metadata file to read")
    parser.add_argument("out_json", type=Path, help="the metadata file to write")
    parser.add_argument("old_out_json", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show every text that changes")
    return parser


main = command(setup_parser, clean)

if __name__ == "__main__":
    sys.exit(main())
