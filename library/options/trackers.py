"""Charts of the run: tensorboard, wandb."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class TrackerOptions(Options):
    """Charts of the run: tensorboard, wandb."""

    logging_dir: str | None = option(None, help="")
    log_with: str | None = option(None, help="", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = option(None, help="")
    log_tracker_name: str | None = option(None, help="")
    wandb_run_name: str | None = option(None, help="")
    log_tracker_config: str | None = option(None, help="")
    wandb_api_key: str | None = option(None, help="")
    log_config: bool = option(False, help="")
