"""Rename the keys of a FLUX.1 LoRA: the path at which other programs start tools/convert_lora.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import UserError
from tools.command import check_output, make_parser, run
from tools.convert_lora import WRITER, convert

EXAMPLES = "  python3 networks/convert_flux_lora.py --src_path from_ai_toolkit.safetensors --dst_path mine.safetensors"
NAMINGS = {"sd-scripts": "kohya", "ai-toolkit": "diffusers"}


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--src", choices=tuple(NAMINGS), default="ai-toolkit", help="whose names the file has")
    parser.add_argument("--dst", choices=tuple(NAMINGS), default="sd-scripts", help="whose names to write")
    parser.add_argument("--src_path", type=Path, required=True, help="the LoRA to read")
    parser.add_argument("--dst_path", type=Path, required=True, help="the LoRA to write")
    return parser


def rename(args: argparse.Namespace) -> None:
    """Read, rename and write the LoRA. Keys that the other naming does not support are dropped and reported."""
    if args.src == args.dst:
        raise UserError(f"--src and --dst are both {args.src}; there is nothing to rename")
    check_output("--dst_path", args.dst_path, WRITER, [args.src_path])
    convert(args.src_path, args.dst_path, NAMINGS[args.dst], drop_unsupported=True)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), rename, argv)


if __name__ == "__main__":
    sys.exit(main())
