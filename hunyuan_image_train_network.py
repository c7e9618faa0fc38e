"""Train a LoRA-family adapter for HunyuanImage 2.1."""

from library import train_util as train_util
from library.training.command_line.training_script import ScriptTrainer, TrainingScript

SCRIPT = TrainingScript("hunyuan_image")
setup_parser = SCRIPT.setup_parser


class HunyuanImageNetworkTrainer(ScriptTrainer, script=SCRIPT):
    """The trainer for programs that import this script."""


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
