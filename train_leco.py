"""Change concepts of Stable Diffusion 1.x and 2.x by prompts alone (LECO)."""

import argparse

from library import train_util as train_util
from library.architectures.scripts import OtherScripts
from library.collector import importing
from library.launcher import prepare_for_torch
from library.options.leco import LecoOptions
from library.training.command_line.cli import build_parser_of_prompts


def setup_parser() -> argparse.ArgumentParser:
    """Every option of this script; front ends read it."""
    return build_parser_of_prompts(LecoOptions, OtherScripts("train_leco.py"))


if __name__ == "__main__":
    prepare_for_torch()
    with importing("scripts"):
        from library.architectures.sd.assembly import LATENTS, build
        from library.training.command_line.main import main

    raise SystemExit(main(setup_parser(), LecoOptions, build, latents=LATENTS))
