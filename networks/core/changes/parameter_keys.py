"""Parameter keys, the ends of keys in files, that several kinds share. Keys of one kind are in its file."""

ALPHA = "alpha"
DORA_SCALE = "dora_scale"
DOWN = "lora_down.weight"
UP = "lora_up.weight"
START = ".start"  # initial values of factors: in memory and in training states, not in files
