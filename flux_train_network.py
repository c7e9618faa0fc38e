"""Train a LoRA-family adapter for FLUX.1 dev and schnell."""

import argparse

from library import train_util as train_util
from library.architectures.flux.options import FluxOptions
from library.architectures.scripts import OtherScripts
from library.collector import freeze_imports
from library.launcher import prepare_for_torch
from library.training.command_line.cli import build_parser, check_words


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with every option of this script. Front ends read it."""
    return build_parser(
        FluxOptions,
        parts="--clip_l clip_l.safetensors --t5xxl t5xxl.safetensors --ae ae.safetensors",
        elsewhere=OtherScripts("flux_train_network.py"),
    )


class FluxNetworkTrainer:
    """The trainer for programs that import this script."""

    def train(self, args: argparse.Namespace) -> None:
        """Train with the options in `args`. Raises UserError for errors that the user can fix."""
        from library.architectures.flux.assembly import LATENTS, build, build_objective
        from library.training.command_line.main import train_for_program

        train_for_program(self, args, setup_parser(), FluxOptions, build, LATENTS, build_objective)


if __name__ == "__main__":
    parser = check_words(setup_parser())
    prepare_for_torch()
    with freeze_imports("scripts"):
        from library.architectures.flux.assembly import LATENTS, build, build_objective
        from library.training.command_line.main import main

    raise SystemExit(main(parser, FluxOptions, build, latents=LATENTS, objective=build_objective))
