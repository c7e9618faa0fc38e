"""Change concepts of Stable Diffusion XL by prompts alone (LECO), as train_leco.py does for every base model."""

import argparse

from library import train_util as train_util
from library.architectures.scripts import OtherScripts
from library.architectures.sdxl.options import SdxlOptions
from library.collector import freeze_imports
from library.launcher import prepare_for_torch
from library.options.leco import leco_options
from library.training.command_line.cli import build_parser_of_prompts, check_words


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with every option of this script. Front ends read it."""
    return build_parser_of_prompts(leco_options(SdxlOptions), OtherScripts("sdxl_train_leco.py"))


if __name__ == "__main__":
    parser = check_words(setup_parser(), leco_options(SdxlOptions))
    prepare_for_torch()
    with freeze_imports("scripts"):
        from library.architectures.sdxl.assembly import LATENTS, build
        from library.training.command_line.main import main

    # Options of prompts are built from SdxlOptions, which their type does not say.
    raise SystemExit(main(parser, leco_options(SdxlOptions), build, latents=LATENTS))  # type: ignore[arg-type]
