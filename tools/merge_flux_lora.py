"""Merge LoRA files into FLUX.1, whose transformer, CLIP-L and T5-XXL are separate files, or several LoRA files into
one.

Changes of a text encoder are omitted with a warning if its file is not given.
"""

import argparse
import logging
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.flux.merging import open_clip_l, open_t5xxl
from library.base.errors import UserError, about
from library.checkpoints.base_model import BaseModel
from library.commands.adapter_files import names_in, read_adapter
from library.commands.base_models import open_base_model
from library.commands.command import check_output, command
from networks.core.files.adapter_file import AdapterFile
from tools import merge_lora
from tools.merge_adapters import Arithmetic, Weighted, rename_to_kohya

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("lora_te1_", "lora_te3_")


def setup_parser() -> argparse.ArgumentParser:
    """Return the options of tools/merge_lora.py and those for the parts of FLUX.1."""
    parser = merge_lora.setup_parser()
    parser.add_argument("--flux_model", type=Path, dest="sd_model", help="file of the transformer to merge into")
    parser.add_argument("--clip_l", type=Path, help="file of CLIP-L to merge into")
    parser.add_argument("--clip_l_save_to", type=Path, help="the file to write for --clip_l")
    parser.add_argument("--t5xxl", type=Path, help="file of T5-XXL to merge into")
    parser.add_argument("--t5xxl_save_to", type=Path, help="the file to write for --t5xxl")
    parser.add_argument("--working_device", dest="device", help="device to compute on, for example cuda (default: cpu)")
    parser.add_argument("--loading_device", help="has no effect: weights are always read one by one into main memory")
    parser.add_argument("--mem_eff_load_save", action="store_true", help="has no effect: this is always on")
    parser.add_argument("--diffusers", action="store_true", help="has no effect: diffusers' names are recognised")
    return parser


def open_parts(args: argparse.Namespace) -> list[tuple[BaseModel, Path]]:
    """Return each checkpoint with the file to write. Raises UserError if one of the two is missing."""
    parts = [] if args.sd_model is None else [(open_base_model("--flux_model", args.sd_model), args.save_to)]
    inputs = [*args.models, args.sd_model, args.clip_l, args.t5xxl]
    for flag, path, save_to, opener in (
        ("--clip_l", args.clip_l, args.clip_l_save_to, open_clip_l),
        ("--t5xxl", args.t5xxl, args.t5xxl_save_to, open_t5xxl),
    ):
        if (path is None) != (save_to is None):
            raise about(flag, cause="does not fit")(
                f"and {flag}_save_to must be used together: the file to read, and the file to write"
            )
        if path is not None:
            check_output(f"{flag}_save_to", save_to, merge_lora.WRITER, inputs)
            parts.append((opener(flag, path), save_to))
    return parts


def check_modules(file: AdapterFile, known: Collection[str]) -> None:
    """Warn about text encoder modules of an adapter that no checkpoint has; `known` are the modules of all.

    Raises UserError if other modules are missing too, or none is left: the adapter was made for another base model.
    """
    missing = [name for name in file.modules if name not in known]
    others = [name for name in missing if not name.startswith(TEXT_ENCODERS)]
    if others or len(missing) == len(file.modules):
        raise UserError(
            f"{file.origin}: {len(missing)} of its {len(file.modules)} modules are in none of the files to merge into; "
            f"the first is {(others or missing)[0]}; was it made for another base model?"
        )
    if missing:
        text = "omitting %d text encoder layers of %s: set their files with --clip_l and --t5xxl"
        logger.warning(text, len(missing), file.origin)


def merge(args: argparse.Namespace, squares: bool = False) -> None:
    """Read, merge and write; `squares` gives the ratios sd-scripts' meaning if factors are concatenated."""
    if args.sd_model is None and args.clip_l is None and args.t5xxl is None:
        merge_lora.merge(args, squares)
        return
    ratios = merge_lora.check(args)
    if args.lbws:
        raise about("--lbws")("names the blocks of a U-Net, but FLUX.1 has none", "remove it")
    arithmetic = Arithmetic.from_args(args)
    parts = open_parts(args)
    read = [read_adapter(path, "--models") for path in args.models]
    others = names_in(read)
    files = [rename_to_kohya(file, others) for file in read]
    known = {module for base, _ in parts for module in base.modules}
    for file in files:
        check_modules(file, known)
    for base, save_to in parts:
        kept = [{name: module for name, module in file.modules.items() if name in base.modules} for file in files]
        adapters = [Weighted(replace(f, modules=m), ratio) for f, m, ratio in zip(files, kept, ratios, strict=True)]
        with_metadata = bool(base.architecture) and not args.no_metadata  # a text encoder alone has no architecture
        merge_lora.merge_into_checkpoint(base, adapters, save_to, arithmetic, with_metadata)


main = command(setup_parser, merge)

if __name__ == "__main__":
    sys.exit(main())
