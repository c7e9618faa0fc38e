"""Functions of sd-scripts' library.args for programs that import it; nothing here calls them."""

from library.train_util import prepare_dataset_args, read_config_from_file, verify_command_line_training_args

__all__ = ["prepare_dataset_args", "read_config_from_file", "verify_command_line_training_args"]

# LoRA Forge sends these options only where this file has them in quotes.
SHOW_TIMESTEPS = "--show_timesteps"
BLOCK_SWAP = ("--block_swap_h2d_only", "--use_pinned_memory_for_block_swap")

AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
