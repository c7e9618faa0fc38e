"""Rename the keys of an adapter file for another program, without changing its effect: kohya's, generic or diffusers'
names.

Reads files of any trainer and folders saved by PEFT. The generic and diffusers namings have no alpha, so alpha is
multiplied into lora_B. This is exact in the file's own dtype if alpha / rank is a power of two; otherwise both factors
of the module are written as float32.
"""

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from library.base.command_parser import make_parser
from library.base.errors import about
from library.base.terminal import print_line
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.compatibility import programs_that_read
from library.checkpoints.marks import mark_of
from library.checkpoints.recognition import pipeline_in
from library.commands.adapter_files import read_adapter, spec_for_file
from library.commands.command import add_options, check_output, command
from networks.core.files.adapter_file import save_adapter_file
from networks.core.files.foreign_names import split_fused
from networks.core.files.renaming import Renamed, list_some_keys, rename

logger = logging.getLogger(__name__)

WRITER = "tools/convert_lora.py"
EXAMPLES = """\
  python3 tools/convert_lora.py --model my_cat.safetensors --save_to my_cat_diffusers.safetensors --to diffusers
  python3 tools/convert_lora.py --model from_peft.safetensors --save_to for_comfyui.safetensors --to kohya"""


def convert(model: Path, save_to: Path, to: FileNaming, drop_unsupported: bool) -> Renamed:
    """Write `model` to `save_to` in another naming. Raises UserError if that is impossible."""
    file = read_adapter(model, "--model")
    spec = spec_for_file(file, f"--model {model}")
    names = spec.names_of(pipeline_in(file.metadata), file.modules) or spec.names
    if names is not spec.names:  # of a pipeline whose publisher has other names, which no program is known to read
        file = split_fused(file, names)
    elif not programs_that_read(spec, to):
        read = " and ".join(naming for naming in NAMINGS if programs_that_read(spec, naming))
        raise about("--to")(f"{to}: no program reads adapters of {spec.title} in that naming; {read} are read")
    renamed = rename(file, names, to, drop_unsupported)
    if renamed.dropped:
        logger.warning("dropped keys that the %s naming cannot express: %s", to, list_some_keys(renamed.dropped))
    if renamed.widened:
        logger.info(
            "%d modules are written as float32: their alpha / rank cannot be multiplied into the file's dtype exactly",
            len(renamed.widened),
        )
    save_adapter_file(save_to, renamed.file, mark=mark_of(WRITER, save_to))
    return renamed


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    add_options(parser, "model", "save_to")
    parser.add_argument(
        "--to",
        choices=NAMINGS,
        required=True,
        help="kohya: most programs, and the only one that can express everything; generic: original module paths, for "
        "ComfyUI; diffusers: diffusers' module paths",
    )
    parser.add_argument("--drop_unsupported", action="store_true", help="drop what the naming cannot express")
    return parser


def convert_and_report(args: argparse.Namespace) -> None:
    check_output("--save_to", args.save_to, WRITER, [args.model])
    renamed = convert(args.model, args.save_to, args.to, args.drop_unsupported)
    print_line(f"{args.save_to}: {len(renamed.file.modules)} modules in the {args.to} naming")


main = command(setup_parser, convert_and_report)

if __name__ == "__main__":
    sys.exit(main())
