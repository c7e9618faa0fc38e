"""Train a LoRA-family adapter for Stable Diffusion 1.x."""

from library import train_util as train_util
from library.training.command_line.training_script import ScriptTrainer, TrainingScript

SCRIPT = TrainingScript("sd")
setup_parser = SCRIPT.setup_parser


class NetworkTrainer(ScriptTrainer, script=SCRIPT):
    """The trainer for programs that import this script."""


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
