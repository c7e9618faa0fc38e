"""Rename the keys of an adapter file for another program: kohya's, generic or diffusers' names, same effect.

Reads files of any trainer, and folders that PEFT saved. In the generic and the diffusers naming alpha is multiplied
into lora_B: exactly in the file's own dtype where alpha / rank is a power of two, else both factors of the module are
written as float32.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.cards import list_cards
from library.checkpoints.adapter_keys import PEFT_PREFIX, naming_of, without_peft_prefix
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.compatibility import programs_that_read
from library.checkpoints.model_card import ModelCard
from library.checkpoints.recognition import require_card
from library.errors import UserError
from networks.core.files.adapter_file import AdapterFile, read_adapter_file, save_adapter_file
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import Renamed, rename, some_keys
from tools.command import check_output, make_parser, run

logger = logging.getLogger(__name__)

MODELS_OF_PEFT = (
    "unet.", "transformer.", "diffusion_model.", "text_encoder.", "text_encoder_2.", "text_encoder_3.",
    "text_conditioner.",
)  # fmt: skip

EXAMPLES = """\
  python3 tools/convert_lora.py --model my_cat.safetensors --save_to my_cat_diffusers.safetensors --to diffusers
  python3 tools/convert_lora.py --model from_peft.safetensors --save_to for_comfyui.safetensors --to kohya"""


def card_for_file(file: AdapterFile, origin: str) -> ModelCard:
    """The card of the base model that a file is for. Raises UserError where that cannot be told."""
    shapes = {module.keys[leaf]: t.shape for module in file.modules.values() for leaf, t in module.tensors.items()}
    return require_card(list_cards(), shapes, file.metadata, origin)


def read_adapter(path: Path, flag: str) -> AdapterFile:
    """Read an adapter file of any trainer. What PEFT saved alone names modules after a model that it does not name:
    they get the prefix of the model in which all of them are.

    Raises UserError naming `flag`.
    """
    file = read_adapter_file(path, flag)
    paths = [without_peft_prefix(name) for name in file.modules]
    if not all(name.startswith(PEFT_PREFIX) for name in file.modules) or any(naming_of(p) != "unknown" for p in paths):
        return file
    for prefix in MODELS_OF_PEFT:
        if any(all(card.names.find(prefix + path) is not None for path in paths) for card in list_cards()):
            modules = {prefix + path: module for path, module in zip(paths, file.modules.values(), strict=True)}
            return replace(file, modules={name: renamed_module(module, name) for name, module in modules.items()})
    raise UserError(
        f"{file.origin}: PEFT wrote it for a model that is none of those known here (first module: {paths[0]}); "
        "names of diffusers' and of the original modules are known"
    )


def renamed_module(module: ModuleWeights, name: str) -> ModuleWeights:
    """A module and its keys under another name."""
    return replace(module, name=name, keys={leaf: name + key[len(module.name) :] for leaf, key in module.keys.items()})


def convert(model: Path, save_to: Path, to: FileNaming, drop_unsupported: bool) -> Renamed:
    """Write `model` to `save_to` in another naming. Raises UserError saying why that is not possible."""
    file = read_adapter(model, "--model")
    card = card_for_file(file, f"--model {model}")
    if not programs_that_read(card, to):
        raise UserError(
            f"--to {to}: no program reads adapters of {card.title} in that naming; {best_namings(card)} are read"
        )
    renamed = rename(file, card.names, to, drop_unsupported)
    if renamed.dropped:
        logger.warning("left out, the %s naming has no place for them: %s", to, some_keys(renamed.dropped))
    if renamed.widened:
        logger.info(
            "%d modules are written as float32: their alpha / rank cannot be multiplied into the file's dtype exactly",
            len(renamed.widened),
        )
    save_adapter_file(save_to, renamed.file)
    return renamed


def setup_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--model", type=Path, required=True, help="the adapter file, or folder by PEFT, to read")
    parser.add_argument(
        "--save_to", type=Path, required=True, help="the file to write, .safetensors keeps the metadata"
    )
    parser.add_argument(
        "--to",
        choices=NAMINGS,
        required=True,
        help="kohya: most programs, and the only one that holds everything; generic: original module paths, for "
        "ComfyUI; diffusers: diffusers' module paths",
    )
    parser.add_argument(
        "--drop_unsupported", action="store_true", help="leave out what the naming cannot hold instead of refusing"
    )
    return parser


def best_namings(card: ModelCard) -> str:
    """The namings of a base model that some program reads."""
    return " and ".join(naming for naming in NAMINGS if programs_that_read(card, naming))


def convert_and_tell(args: argparse.Namespace) -> None:
    check_output("--save_to", args.save_to)
    renamed = convert(args.model, args.save_to, args.to, args.drop_unsupported)
    print(f"{args.save_to}: {len(renamed.file.modules)} modules in the {args.to} naming")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), convert_and_tell, argv)


if __name__ == "__main__":
    sys.exit(main())
