"""Train a LoRA-family adapter for FLUX.3 Image Klein."""

from library import train_util as train_util
from library.training.command_line.training_script import ScriptTrainer, TrainingScript

SCRIPT = TrainingScript("flux_3")
setup_parser = SCRIPT.setup_parser


class Flux3NetworkTrainer(ScriptTrainer, script=SCRIPT):
    """The trainer for programs that import this script."""


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
