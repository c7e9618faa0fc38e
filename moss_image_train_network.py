"""Train a LoRA-family adapter for MOSS-Image."""

import argparse

from library import train_util as train_util
from library.architectures.moss_image.options import MossImageOptions
from library.architectures.scripts import OtherScripts
from library.collector import freeze_imports
from library.launcher import prepare_for_torch
from library.training.command_line.cli import build_parser, check_words


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with every option of this script. Front ends read it."""
    return build_parser(
        MossImageOptions,
        parts="--text_encoder qwen3.5_9b_bf16.safetensors --vae flux2-vae.safetensors",
        elsewhere=OtherScripts("moss_image_train_network.py"),
    )


class MossImageNetworkTrainer:
    """The trainer for programs that import this script."""

    def train(self, args: argparse.Namespace) -> None:
        """Train with the options in `args`. Raises UserError for errors that the user can fix."""
        from library.architectures.moss_image.assembly import LATENTS, build, build_objective
        from library.training.command_line.main import train_for_program

        train_for_program(self, args, setup_parser(), MossImageOptions, build, LATENTS, build_objective)


if __name__ == "__main__":
    parser = check_words(setup_parser())
    prepare_for_torch()
    with freeze_imports("scripts"):
        from library.architectures.moss_image.assembly import LATENTS, build, build_objective
        from library.training.command_line.main import main

    raise SystemExit(main(parser, MossImageOptions, build, latents=LATENTS, objective=build_objective))
