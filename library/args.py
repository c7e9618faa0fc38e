"""Functions of sd-scripts' library.args for programs that import it; nothing here calls them."""

from library.train_util import prepare_dataset_args, read_config_from_file, verify_command_line_training_args

__all__ = ["prepare_dataset_args", "read_config_from_file", "verify_command_line_training_args"]

SHOW_TIMESTEPS = "--show_timesteps"  # LoRA Forge sends the option only where this file has it in quotes

AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
