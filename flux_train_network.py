"""Train a LoRA-family adapter for FLUX.1 dev and schnell."""

from library import train_util as train_util
from library.training.command_line.training_script import ScriptTrainer, TrainingScript

SCRIPT = TrainingScript("flux")
setup_parser = SCRIPT.setup_parser


class FluxNetworkTrainer(ScriptTrainer, script=SCRIPT):
    """The trainer for programs that import this script."""


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
