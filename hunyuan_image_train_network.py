"""Train a LoRA-family adapter for HunyuanImage 2.1."""

import argparse

from library import train_util as train_util
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.architectures.scripts import OtherScripts
from library.collector import freeze_imports
from library.launcher import prepare_for_torch
from library.training.command_line.cli import build_parser, check_words


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser with every option of this script. Front ends read it."""
    return build_parser(
        HunyuanImageOptions,
        parts="--text_encoder qwen_2.5_vl.safetensors --byt5 byt5.safetensors --vae vae.safetensors",
        elsewhere=OtherScripts("hunyuan_image_train_network.py"),
    )


class HunyuanImageNetworkTrainer:
    """The trainer for programs that import this script."""

    def train(self, args: argparse.Namespace) -> None:
        """Train with the options in `args`. Raises UserError for errors that the user can fix."""
        from library.architectures.hunyuan_image.assembly import LATENTS, build, build_objective
        from library.training.command_line.main import train_for_program

        train_for_program(self, args, setup_parser(), HunyuanImageOptions, build, LATENTS, build_objective)


if __name__ == "__main__":
    parser = check_words(setup_parser())
    prepare_for_torch()
    with freeze_imports("scripts"):
        from library.architectures.hunyuan_image.assembly import LATENTS, build, build_objective
        from library.training.command_line.main import main

    raise SystemExit(main(parser, HunyuanImageOptions, build, latents=LATENTS, objective=build_objective))
