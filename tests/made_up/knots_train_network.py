"""Train a LoRA-family adapter for Knots, a made-up base model."""

from library.training.command_line.training_script import TrainingScript

SCRIPT = TrainingScript("knots")
setup_parser = SCRIPT.setup_parser

if __name__ == "__main__":
    raise SystemExit(SCRIPT.run())
