"""Train a LoRA-family adapter for Knots, a made-up base model."""

import argparse

from library.architectures.knots.options import KnotsOptions
from library.architectures.scripts import OtherScripts
from library.launcher import prepare_for_torch
from library.training.command_line.cli import build_parser, check_words


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with every option of this script. Front ends read it."""
    return build_parser(KnotsOptions, elsewhere=OtherScripts("knots_train_network.py"))


if __name__ == "__main__":
    parser = check_words(setup_parser())
    prepare_for_torch()
    from library.architectures.knots.assembly import LATENTS, build
    from library.training.command_line.main import main

    raise SystemExit(main(parser, KnotsOptions, build, latents=LATENTS))
