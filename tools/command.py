"""Common options, dtypes, start and error handling of the commands for adapter files."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from library.checkpoints.files import SAFETENSORS_SUFFIXES, is_safetensors
from library.checkpoints.overwriting import check_not_input
from library.errors import UserError
from library.formatting import escape_controls
from library.hidden_libraries import BITSANDBYTES, hidden
from library.memory.devices import SAVE_DTYPES
from library.training.command_line.console import LINES, setup_plain_logging
from library.version import add_version

FILE_PRECISIONS = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("fp8", "fp8_e4m3fn", "float8_e4m3fn"), torch.float8_e4m3fn),
    **dict.fromkeys(("fp8_e5m2", "float8_e5m2"), torch.float8_e5m2),
}
"""Precisions of whole checkpoints by the words that programs use for them."""
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".sft")


def run(
    parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parse, act, and return the exit status: 0 success, 1 user error, 130 interrupted."""
    args = parser.parse_args(argv)
    setup_plain_logging()
    try:
        with hidden(BITSANDBYTES):
            action(args)
    except UserError as error:
        print(f"error: {escape_controls(str(error), keep=LINES)}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno is None or error.filename is None:  # not an error of the operating system
            raise
        print(f"error: {escape_controls(str(error), keep=LINES)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; no partial file was written", file=sys.stderr)
        return 130
    return 0


def completed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Complete the options of a program that calls a command as a function: missing ones get defaults, paths may be
    strings."""
    values = {action.dest: getattr(args, action.dest, action.default) for action in parser._actions}
    for action in parser._actions:
        value = values[action.dest]
        if action.type is Path and value is not None:
            values[action.dest] = [Path(item) for item in value] if isinstance(value, list) else Path(value)
    return argparse.Namespace(**values)


def make_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples."""
    return add_version(
        argparse.ArgumentParser(
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )


def make_training_parser(description: str | None, examples: str, example_script: str) -> argparse.ArgumentParser:
    """Return a parser for `parse_known_args`: what it does not know is left to the training script that is named."""
    parser = make_parser(description, examples)
    parser.allow_abbrev = False  # abbreviations refer to training options
    parser.add_argument("--script", required=True, help=f"training script, such as {example_script}")
    parser.epilog = f"all other options are those of the training.\n\n{parser.epilog}"
    return parser


def add_save_precision(parser: argparse.ArgumentParser, unset: str) -> None:
    """Add the precision of an adapter file; `unset` describes the default."""
    parser.add_argument("--save_precision", choices=tuple(SAVE_DTYPES), help=f"precision of the file; unset: {unset}")


def add_file_precision(parser: argparse.ArgumentParser) -> None:
    """Add the precision of a checkpoint, which accepts all words of `FILE_PRECISIONS`."""
    parser.add_argument(
        "--save_precision", help="precision of the file: float32, fp16, bf16, fp8 ...; unset: that of each tensor"
    )


def dtype_of_file(name: str | None) -> torch.dtype | None:
    """Return the dtype of a precision's name. Raises UserError for an unknown one."""
    if name is None:
        return None
    if name.lower() not in FILE_PRECISIONS:
        raise UserError(f"--save_precision is {name}; use one of {', '.join(FILE_PRECISIONS)}")
    return FILE_PRECISIONS[name.lower()]


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="device to compute on, for example cuda (default: cpu)")


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a precision on the command line."""
    return None if name is None else SAVE_DTYPES[name]


def check_output(flag: str, path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError unless the extension determines the format and the file can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag} {path}: the name must end in one of {', '.join(SUFFIXES)}, which chooses the format")
    check_place(flag, path, inputs)


def check_safetensors_output(flag: str, path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError unless the file can be written as safetensors, the only format."""
    if not is_safetensors(path):
        raise UserError(f"{flag} {path}: the name must end in {' or '.join(SAFETENSORS_SUFFIXES)}, the only format")
    check_place(flag, path, inputs)


def check_place(flag: str, path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError if no file of this name can be written, or one of `inputs` would be overwritten."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; use the name of a file")
    check_not_input(flag, path, inputs)
    check_folder(flag, path)


def check_new_folder(flag: str, path: Path) -> None:
    """Raise UserError unless a folder can be created there."""
    if path.exists():
        raise UserError(f"{flag} {path} already exists; use the name of a new folder")
    check_folder(flag, path)


def check_folder(flag: str, path: Path) -> None:
    """Raise UserError if nothing can be written beside `path`; missing folders will be created."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: {folder} is a file, not a folder; use another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {folder} is not writable; change its permissions, or use another folder")


def resolve_device(name: str) -> torch.device:
    """Return the device to compute on. Raises UserError if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); use cpu, or cuda if there is a GPU") from None
    return device


def with_comment(old: str | None, comment: str) -> str:
    """Prepend a tool's remark to `ss_training_comment`."""
    return f"{comment}; {old}" if old and old != "None" else comment
