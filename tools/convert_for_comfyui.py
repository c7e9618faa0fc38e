"""Rename the keys of an adapter file for ComfyUI: the shared code of two sd-scripts commands, whose modules are in
networks/.

Users should call tools/convert_lora.py, which supports all base models and namings.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from library.checkpoints.adapter_names import FileNaming
from library.errors import UserError
from library.version import add_version
from tools.command import check_output, run
from tools.convert_lora import WRITER, convert, read_adapter, spec_for_file


def command(description: str | None, base: str, to: FileNaming, back: FileNaming | None) -> Callable[..., int]:
    """Return the `main` of such a module, for files of base model `base`: convert to naming `to`, or with --reverse to
    naming `back`.

    `back` is None if sd-scripts has no naming of its own.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        return run(setup_parser(description), partial(rename, base, to, back), argv)

    return main


def setup_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the commands' options."""
    parser = add_version(argparse.ArgumentParser(description=description))
    parser.add_argument("src_path", type=Path, help="the adapter file to read")
    parser.add_argument("dst_path", type=Path, help="the adapter file to write")
    parser.add_argument(
        "--reverse", action="store_true", help="rename from ComfyUI's names to those that training writes"
    )
    return parser


def rename(base: str, to: FileNaming, back: FileNaming | None, args: argparse.Namespace) -> None:
    """Read, rename and write the file. Raises UserError for another base model, and if there is nothing to rename."""
    check_output("dst_path", args.dst_path, WRITER, [args.src_path])
    spec = spec_for_file(read_adapter(args.src_path, "src_path"), str(args.src_path))
    if spec.name != base:
        raise UserError(f"{args.src_path} is an adapter of {spec.title}; use tools/convert_lora.py")
    if args.reverse and back is None:
        raise UserError(
            f"--reverse: {args.src_path} needs no renaming, because training and all tools use ComfyUI's names for "
            f"{spec.title}; pass it to --network_weights as it is"
        )
    renamed = convert(args.src_path, args.dst_path, (back or to) if args.reverse else to, drop_unsupported=False)
    print(f"{args.dst_path}: {len(renamed.file.modules)} modules renamed")
