"""Train a LoRA-family adapter for any text-to-image pipeline of diffusers."""

import argparse

from library import train_util as train_util
from library.training.command_line.training_script import TrainingScript

SCRIPT = TrainingScript("any_pipeline")
setup_parser = SCRIPT.setup_parser


class DiffusersNetworkTrainer:
    """The trainer for programs that import this script."""

    def train(self, args: argparse.Namespace) -> None:
        """Train with the options in `args`. Raises UserError for errors that the user can fix."""
        SCRIPT.train(self, args)


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
