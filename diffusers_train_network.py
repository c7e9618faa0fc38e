"""Train a LoRA-family adapter for any text-to-image pipeline of diffusers."""

import argparse

from library import train_util as train_util
from library.architectures.any_pipeline.options import SCRIPT, PipelineOptions
from library.architectures.scripts import OtherScripts
from library.collector import freeze_imports
from library.launcher import prepare_for_torch
from library.training.command_line.cli import build_parser, check_words


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with every option of this script. Front ends read it."""
    return build_parser(PipelineOptions, elsewhere=OtherScripts(SCRIPT))


class DiffusersNetworkTrainer:
    """The trainer for programs that import this script."""

    def train(self, args: argparse.Namespace) -> None:
        """Train with the options in `args`. Raises UserError for errors that the user can fix."""
        from library.architectures.any_pipeline.assembly import LATENTS, build
        from library.training.command_line.main import train_for_program

        train_for_program(self, args, setup_parser(), PipelineOptions, build, LATENTS)


if __name__ == "__main__":
    parser = check_words(setup_parser())
    prepare_for_torch()
    with freeze_imports("scripts"):
        from library.architectures.any_pipeline.assembly import LATENTS, build
        from library.training.command_line.main import main

    raise SystemExit(main(parser, PipelineOptions, build, latents=LATENTS))
