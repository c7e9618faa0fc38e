"""Train a LoRA-family adapter for Qwen-Image 2.1."""

from library import train_util as train_util
from library.training.command_line.training_script import ScriptTrainer, TrainingScript

SCRIPT = TrainingScript("qwen_image_21")
setup_parser = SCRIPT.setup_parser


class QwenImage21NetworkTrainer(ScriptTrainer, script=SCRIPT):
    """The trainer for programs that import this script."""


if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
