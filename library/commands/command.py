"""Shared parts of the command-line tools: common options, dtypes, entry points, error handling."""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.terminal import ERRORS_JSON
from library.checkpoints.headers import SAFETENSORS_SUFFIXES, is_safetensors
from library.checkpoints.marks import mark_of
from library.checkpoints.overwriting import FileKind, check_target, marked
from library.commands.exit_status import act
from library.memory.devices import SAVE_DTYPES

FILE_PRECISIONS = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("fp8", "fp8_e4m3fn", "float8_e4m3fn"), torch.float8_e4m3fn),
    **dict.fromkeys(("fp8_e5m2", "float8_e5m2"), torch.float8_e5m2),
}
"""Names of the precisions of whole checkpoints, as other programs spell them."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "model": {"type": Path, "required": True, "help": "the adapter file to read, of any trainer, or a folder by PEFT"},
    "models": {"type": Path, "nargs": "+", "required": True, "help": "the files to merge"},
    "ratios": {"type": float, "nargs": "+", "help": "share of each file"},
    "save_to": {"type": Path, "required": True, "help": "the file to write: .safetensors keeps the metadata"},
    "new_rank": {"type": int, "help": "rank of the result"},
    "new_conv_rank": {"type": int, "help": "rank of kernels larger than 1x1; unset: --new_rank"},
    "precision": {"choices": tuple(SAVE_DTYPES), "default": "float", "help": "precision of the arithmetic"},
    "save_precision": {"choices": tuple(SAVE_DTYPES), "help": "precision of the file; unset: as in the input"},
    "device": {"default": "cpu", "help": "device to compute on, for example cuda (default: cpu)"},
    "no_metadata": {"action": "store_true", "help": "write no modelspec.* metadata"},
    "v2": {"action": "store_true", "help": "has no effect: checkpoints are recognised"},
}
"""The options that several tools have, by name."""
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".sft")


Action = Callable[[argparse.Namespace], int | None]
"""The work of a command. Returns the exit status; None means success."""


def run(parser: argparse.ArgumentParser, action: Action, argv: Sequence[str] | None) -> int:
    """Parse the command line, run `action` and return the exit status: 0 success, 1 user error, 130 interrupted, or
    the action's own."""
    return act(partial(action, parser.parse_args(argv)), argv)


def command(setup_parser: Callable[[], argparse.ArgumentParser], action: Action) -> Callable[..., int]:
    """Return the `main` of a command: it takes a command line (default: the process's) and returns the exit status."""

    def main(argv: Sequence[str] | None = None) -> int:
        return run(setup_parser(), action, argv)

    return main


def training_command(
    setup_parser: Callable[[], argparse.ArgumentParser], action: Callable[[argparse.Namespace, list[str]], int | None]
) -> Callable[..., int]:
    """Return the `main` of a command that passes unknown options on to a training script."""

    def main(argv: Sequence[str] | None = None) -> int:
        args, others = setup_parser().parse_known_args(argv)
        return act(partial(action, args, [*others, *[ERRORS_JSON] * args.errors_json]), argv)

    return main


def complete_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Complete the options of a program that calls the command: add missing defaults and convert strings to paths."""
    values = {action.dest: getattr(args, action.dest, action.default) for action in parser._actions}
    for action in parser._actions:
        value = values[action.dest]
        if action.type is Path and value is not None:
            values[action.dest] = [Path(item) for item in value] if isinstance(value, list) else Path(value)
    return argparse.Namespace(**values)


def make_training_parser(
    description: str | None, examples: str, script: str | None = "train_network.py", others: str = "the training"
) -> argparse.ArgumentParser:
    """Return a parser for `training_command`; its help says that all other options are those of `others`.

    `script` is the example in the help of --script; None leaves that option out.
    """
    # Abbreviations refer to training options.
    parser = make_parser(description, examples, allow_abbrev=False)
    parser.epilog = f"all other options are those of {others}.\n\n{parser.epilog}"
    if script is not None:
        parser.add_argument("--script", required=True, help=f"training script, such as {script}")
    return parser


def add_options(parser: argparse.ArgumentParser, *names: str, **changes: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Add options of `OPTIONS`, in this order; `changes` has what a tool says differently, by name."""
    for name in names:
        parser.add_argument(f"--{name}", **{**OPTIONS[name], **changes.get(name, {})})
    return parser


def add_file(parser: argparse.ArgumentParser, title: str) -> None:
    """Add --model and the same file as a positional argument, one of which is required."""
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--model", type=Path, help=title)
    inputs.add_argument("file", type=Path, nargs="?", help="the same, as a positional argument")


def add_file_precision(parser: argparse.ArgumentParser) -> None:
    """Add --save_precision for a checkpoint, which accepts every name in `FILE_PRECISIONS`."""
    parser.add_argument("--save_precision", help="float32, fp16, bf16, fp8 ...; unset: the precision of each tensor")


def dtype_of_file(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name in `FILE_PRECISIONS`; None for None. Raises UserError for an unknown name."""
    if name is None:
        return None
    if name.lower() not in FILE_PRECISIONS:
        raise about("--save_precision")(f"is {name}", f"use one of {', '.join(FILE_PRECISIONS)}")
    return FILE_PRECISIONS[name.lower()]


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a validated --save_precision; None if unset."""
    return None if name is None else SAVE_DTYPES[name]


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError if an option is below 1; None means unset."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise about(f"--{name}")(f"is {value}; it must be at least 1")


def check_finite(flag: str, *numbers: float) -> None:
    """Raise UserError for NaN and infinity."""
    for number in numbers:
        if not math.isfinite(number):
            raise about(flag)(f"has {number}", "use a finite number")


def resolve_ratios(args: argparse.Namespace, unset: float) -> list[float]:
    """Return one ratio per file of --models; without --ratios, `unset`.

    Raises UserError if the counts differ or a ratio is not finite.
    """
    ratios = args.ratios or [unset] * len(args.models)
    check_finite("--ratios", *ratios)
    if len(ratios) != len(args.models):
        raise about("--ratios")(f"has {len(ratios)} values, but --models {len(args.models)}", "use one for each file")
    return ratios


def check_extension(flag: str, path: Path) -> None:
    """Raise UserError unless the extension selects a weight file format."""
    if path.suffix.lower() not in SUFFIXES:
        raise about(flag, path)(f": the name must end in one of {', '.join(SUFFIXES)}, which chooses the format")


def check_output(flag: str, path: Path, writer: str, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError unless the extension selects a weight file format and the file can be written by `writer`, a
    command, without a loss."""
    check_extension(flag, path)
    check_place(flag, path, written_by(writer, path), inputs)


def check_safetensors_output(flag: str, path: Path, writer: str, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError as `check_output` does, and for other extensions than those of safetensors."""
    if not is_safetensors(path):
        raise about(flag, path)(f": the name must end in {' or '.join(SAFETENSORS_SUFFIXES)}, the only format")
    check_place(flag, path, written_by(writer, path), inputs)


def written_by(writer: str, path: Path) -> FileKind:
    """Return the kind of the files that a command marks as its own."""
    return marked(f"a file that {writer} wrote to this name", mark_of(writer, path))


def check_place(flag: str, path: Path, kind: FileKind, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError if `path` cannot be written, or would replace an input or what the command did not write."""
    check_target(flag, path, kind, inputs)
    check_folder(flag, path)


def check_output_folder(flag: str, path: Path, writer: str) -> None:
    """Raise UserError if a diffusers folder cannot be written, or would replace what the command did not write."""
    kind = marked(f"a model that {writer} wrote, with its files only", mark_of(writer, path), is_folder=True)
    check_place(flag, path, kind)


def check_folder(flag: str, path: Path) -> None:
    """Raise UserError if nothing can be created at `path`; missing parent folders are allowed."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise about(flag, path)(f": {folder} is a file, not a folder", "use another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise about(flag, path)(f": {folder} is not writable", "change its permissions, or use another folder")


def resolve_device(name: str) -> torch.device:
    """Return the device of --device. Raises UserError if it cannot be used."""
    try:
        # torch.device accepts devices that this machine lacks; only an allocation shows that one can be used.
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise about("--device")(f"{name} cannot be used ({reason})", "use cpu, or cuda if there is a GPU") from None
    return device


def with_comment(metadata: Mapping[str, str], comment: str) -> dict[str, str]:
    """Return an adapter's metadata with a tool's remark in front of its `ss_training_comment`."""
    old = metadata.get("ss_training_comment", "None")
    return {**metadata, "ss_training_comment": comment if old in ("", "None") else f"{comment}; {old}"}
