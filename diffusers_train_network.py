"""Train a LoRA-family adapter for any text-to-image pipeline of diffusers."""

from library import train_util as train_util
from library.training.command_line.training_script import ScriptTrainer, TrainingScript

SCRIPT = TrainingScript("any_pipeline")
setup_parser = SCRIPT.setup_parser


class DiffusersNetworkTrainer(ScriptTrainer, script=SCRIPT):
    """The trainer for programs that import this script."""


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
