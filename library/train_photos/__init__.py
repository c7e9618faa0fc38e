"""The parts of train.py, from a folder of photos to a LoRA."""
