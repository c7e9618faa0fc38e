"""Train a LoRA on a folder of photos: finds out what the base model is, takes its recipe, shows a plan and trains."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from library.base.launcher import prepare_for_torch

EXAMPLES = """\
  python3 train.py pictures/my_cat --base path/to/sd_xl_base_1.0.safetensors --trigger "mycat, a cat"
  python3 train.py pictures/my_cat --base path/to/v1-5.safetensors --trigger "mycat, a cat" --network_dim 8
  python3 train.py configs/quickstart/dataset --base configs/quickstart/toy_base --trigger heart --yes"""


def setup_parser() -> argparse.ArgumentParser:
    from library.base.command_parser import make_parser

    parser = make_parser(__doc__, EXAMPLES)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder with photos, also in folders below it")
    parser.add_argument("--base", required=True, help="base model: a file, a diffusers folder or a Hugging Face name")
    parser.add_argument("--trigger", help='word that calls it, and what it is: "mycat, a cat" (default: asked for)')
    parser.add_argument("--kind", choices=("character", "style"), default="character", help="of the recipe")
    parser.add_argument("--like", type=Path, metavar="FILE", help="train as this LoRA or configuration was trained")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="length of the training (default: by the number of photos)")
    length.add_argument("--minutes", type=float, help="length of the training, as this machine is predicted to run it")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder with text encoders and VAEs, as ComfyUI's")
    parser.add_argument("--prediction", choices=("epsilon", "v"), help="what the base predicts, if that is not clear")
    parser.add_argument("--leave_out", nargs="+", action="extend", default=[], metavar="FILE", help="photos not to use")
    parser.add_argument("--keep_all", action="store_true", help="also train on copies, and on very small photos")
    parser.add_argument(
        "--class_images",
        type=int,
        default=0,
        metavar="N",
        help='also train on N images of "a cat", drawn by the base first',
    )
    parser.add_argument("--caption", action="store_true", help="first write captions for photos without one")
    parser.add_argument("--output_dir", type=Path, help="folder for what is saved (default: output/NAME)")
    parser.add_argument("--name", help="name of what is saved (default: from the folder of photos)")
    parser.add_argument("--plan_only", action="store_true", help="write the plan, and print the command that trains")
    parser.add_argument("--yes", action="store_true", help="ask nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, ask and train. Return the exit status."""
    from library.commands.exit_status import act
    from library.train_photos.command_line import read_command_line
    from library.train_photos.session import train_photos

    return act(lambda: train_photos(*read_command_line(add_options, setup_parser(), argv)), argv)


if __name__ == "__main__":
    prepare_for_torch()
    sys.exit(main())
