"""Train a LoRA-family adapter for HunyuanImage 2.1."""

import argparse

from library import train_util as train_util
from library.training.command_line.training_script import TrainingScript

SCRIPT = TrainingScript("hunyuan_image")
setup_parser = SCRIPT.setup_parser


class HunyuanImageNetworkTrainer:
    """The trainer for programs that import this script."""

    def train(self, args: argparse.Namespace) -> None:
        """Train with the options in `args`. Raises UserError for errors that the user can fix."""
        SCRIPT.train(self, args)


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
