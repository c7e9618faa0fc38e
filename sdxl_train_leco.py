"""Change concepts of Stable Diffusion XL by prompts alone (LECO), as train_leco.py does for every base model."""

import argparse
from functools import partial
from typing import Any

from library import train_util as train_util
from library.architectures.scripts import OtherScripts
from library.architectures.sdxl.options import SdxlOptions
from library.base.collector import freeze_imports
from library.base.launcher import prepare_for_torch
from library.options.leco import leco_options
from library.training.command_line.cli import build_parser_of_prompts, check_training, check_words
from library.training.command_line.training_script import find_build


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with every option of this script. Front ends read it."""
    return build_parser_of_prompts(leco_options(SdxlOptions), OtherScripts("sdxl_train_leco.py"))


if __name__ == "__main__":
    kind: type[Any] = leco_options(SdxlOptions)  # built from SdxlOptions, which its type does not say
    command_line = check_words(setup_parser(), partial(check_training, kind))
    if command_line.args.sweep:
        from library.training.command_line.sweeps import sweep_by_command

        raise SystemExit(sweep_by_command(command_line, kind, partial(find_build, "sdxl")))
    prepare_for_torch()
    with freeze_imports("scripts"):
        from library.architectures.sdxl.assembly import LATENTS, build
        from library.training.command_line.main import main

    raise SystemExit(main(command_line.parser, kind, build, latents=LATENTS, command_line=command_line))
