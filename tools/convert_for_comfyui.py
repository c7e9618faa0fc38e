"""Rename the keys of an adapter file: what three sd-scripts commands do, whose modules are in networks/.

Users should call tools/convert_lora.py, which supports all base models and namings.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from library.base.command_parser import make_parser
from library.base.errors import about, of_file
from library.base.terminal import print_line
from library.checkpoints.adapter_names import FileNaming
from library.commands import command as tool
from library.commands.adapter_files import read_adapter, spec_for_file
from tools.convert_lora import WRITER, convert

NAMINGS: dict[str, FileNaming] = {"sd-scripts": "kohya", "ai-toolkit": "diffusers"}


def command(description: str | None, base: str, to: FileNaming, back: FileNaming | None) -> Callable[..., int]:
    """Return the `main` of a module for files of base model `base`: convert to naming `to`, or with --reverse to
    naming `back`.

    `back` is None if sd-scripts has no naming of its own.
    """

    def setup_parser() -> argparse.ArgumentParser:
        parser = make_parser(description)
        parser.add_argument("src_path", type=Path, help="the adapter file to read")
        parser.add_argument("dst_path", type=Path, help="the adapter file to write")
        parser.add_argument("--reverse", action="store_true", help="rename from ComfyUI's names to those of training")
        return parser

    return tool.command(setup_parser, partial(rename, base, to, back))


def rename(base: str, to: FileNaming, back: FileNaming | None, args: argparse.Namespace) -> None:
    """Read, rename and write the file. Raises UserError for another base model, and if there is nothing to rename."""
    tool.check_output("dst_path", args.dst_path, WRITER, [args.src_path])
    spec = spec_for_file(read_adapter(args.src_path, "src_path"), str(args.src_path))
    if spec.name != base:
        raise of_file(args.src_path)(f"is an adapter of {spec.title}", "use tools/convert_lora.py")
    if args.reverse and back is None:
        raise about("--reverse")(
            f": {args.src_path} needs no renaming, because training and all tools use ComfyUI's names for {spec.title}",
            "pass it to --network_weights as it is",
        )
    renamed = convert(args.src_path, args.dst_path, (back or to) if args.reverse else to, drop_unsupported=False)
    print_line(f"{args.dst_path}: {len(renamed.file.modules)} modules renamed")


def command_by_trainer(description: str | None) -> Callable[..., int]:
    """Return the `main` of a module that renames between the names of two trainers."""

    def setup_parser() -> argparse.ArgumentParser:
        parser = make_parser(description)
        parser.add_argument("--src", choices=tuple(NAMINGS), default="ai-toolkit", help="whose names the file has")
        parser.add_argument("--dst", choices=tuple(NAMINGS), default="sd-scripts", help="whose names to write")
        parser.add_argument("--src_path", type=Path, required=True, help="the LoRA to read")
        parser.add_argument("--dst_path", type=Path, required=True, help="the LoRA to write")
        return parser

    return tool.command(setup_parser, rename_by_trainer)


def rename_by_trainer(args: argparse.Namespace) -> None:
    """Read, rename and write the LoRA. Keys that the other naming does not support are dropped and reported."""
    if args.src == args.dst:
        raise about("--src", cause="does not fit", others=["--dst"])(
            f"and --dst are both {args.src}; there is nothing to rename"
        )
    tool.check_output("--dst_path", args.dst_path, WRITER, [args.src_path])
    convert(args.src_path, args.dst_path, NAMINGS[args.dst], drop_unsupported=True)
