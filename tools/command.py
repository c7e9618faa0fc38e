"""What the commands for adapter files share: options, dtypes, and how they start and fail."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from library.checkpoints.files import SAFETENSORS_SUFFIXES, is_safetensors
from library.checkpoints.overwriting import check_not_input
from library.errors import UserError
from library.hidden_libraries import BITSANDBYTES, hidden
from library.memory.devices import SAVE_DTYPES
from library.training.command_line.console import setup_plain_logging
from library.version import add_version

logger = logging.getLogger(__name__)

FILE_PRECISIONS = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("fp8", "fp8_e4m3fn", "float8_e4m3fn"), torch.float8_e4m3fn),
    **dict.fromkeys(("fp8_e5m2", "float8_e5m2"), torch.float8_e5m2),
}
"""Precisions of whole checkpoints by the words that programs have for them."""
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".sft")


def run(
    parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parse, act, and give the exit status: 0 done, 1 for what the user can put right, 130 when interrupted."""
    args = parser.parse_args(argv)
    setup_plain_logging()
    try:
        with hidden(BITSANDBYTES):
            action(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno is None or error.filename is None:  # nothing that the operating system refused
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written half", file=sys.stderr)
        return 130
    return 0


def completed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The options of a program that calls a command as a function: what it leaves out has its default, paths may be
    text."""
    values = {action.dest: getattr(args, action.dest, action.default) for action in parser._actions}
    for action in parser._actions:
        value = values[action.dest]
        if action.type is Path and value is not None:
            values[action.dest] = [Path(item) for item in value] if isinstance(value, list) else Path(value)
    return argparse.Namespace(**values)


def make_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with --version whose help ends with examples."""
    return add_version(
        argparse.ArgumentParser(
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )


def add_save_precision(parser: argparse.ArgumentParser, unset: str) -> None:
    """--save_precision; `unset` says what happens without it."""
    parser.add_argument("--save_precision", choices=tuple(SAVE_DTYPES), help=f"precision of the file; unset: {unset}")


def add_file_precision(parser: argparse.ArgumentParser) -> None:
    """Add --save_precision for a checkpoint, which takes any of the words of `FILE_PRECISIONS`."""
    parser.add_argument(
        "--save_precision", help="precision of the file: float32, fp16, bf16, fp8 ...; unset: that of each tensor"
    )


def dtype_of_file(name: str | None) -> torch.dtype | None:
    """Return the dtype of a value of --save_precision. Raises UserError for one that is not known."""
    if name is None:
        return None
    if name.lower() not in FILE_PRECISIONS:
        raise UserError(f"--save_precision is {name}; known are {', '.join(FILE_PRECISIONS)}")
    return FILE_PRECISIONS[name.lower()]


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="device to compute on, for example cuda (default: cpu)")


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of a precision on the command line."""
    return None if name is None else SAVE_DTYPES[name]


def check_output(flag: str, path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError unless the extension says how to write the file, and nothing is in the way of it."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag} {path}: the name must end in one of {', '.join(SUFFIXES)}, which chooses the format")
    check_place(flag, path, inputs)


def check_safetensors_output(flag: str, path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """The same where safetensors is the one format."""
    if not is_safetensors(path):
        raise UserError(f"{flag} {path}: the name must end in {' or '.join(SAFETENSORS_SUFFIXES)}, the one format here")
    check_place(flag, path, inputs)


def check_place(flag: str, path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UserError where no file of this name can be written, or one of `inputs` would be lost by it."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give the name of a file")
    check_not_input(flag, path, inputs)
    check_folder(flag, path)


def check_new_folder(flag: str, path: Path) -> None:
    """Raise UserError unless a folder can be made there."""
    if path.exists():
        raise UserError(f"{flag} {path} exists already; name a folder that does not")
    check_folder(flag, path)


def check_folder(flag: str, path: Path) -> None:
    """Raise UserError where nothing can be written beside `path`; folders that are missing will be made."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: {folder} is a file, in which nothing can lie; give another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{flag} {path}: nothing may be written into {folder}; change its permissions, or give another folder"
        )


def device_of(name: str) -> torch.device:
    """The device to compute on. Raises UserError when it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); use cpu, or cuda where there is a card") from None
    return device


def with_comment(old: str | None, comment: str) -> str:
    """`ss_training_comment` with what a tool did in front."""
    return f"{comment}; {old}" if old and old != "None" else comment
