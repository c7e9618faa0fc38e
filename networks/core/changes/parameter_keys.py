"""Ends of keys that several kinds share; those of one kind stand in its file."""

ALPHA = "alpha"
DORA_SCALE = "dora_scale"
DOWN = "lora_down.weight"
UP = "lora_up.weight"
START = ".start"  # what factors started as: in memory and in states, not in files
