"""Charts of the run: tensorboard, wandb."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import whole

DRAWN = ("logging_dir", "log_with=wandb|all")


@dataclass(frozen=True)
class TrackerOptions(Options, affects_training=False):
    """Charts of the run: tensorboard, wandb."""

    logging_dir: str | None = option(None, path="new folder", usual=True, logged=False)
    """Folder for charts of loss and learning rates; each run makes its own folder inside. Unset draws none."""
    log_with: str | None = option(None, usual=True, choices=("tensorboard", "wandb", "all"))
    """Where charts go: tensorboard, wandb or all. Unset is tensorboard once --logging_dir is set."""
    log_prefix: str | None = option(None, needs="logging_dir")
    """Text before the date in the name of the run's folder below --logging_dir."""
    log_tracker_name: str | None = option(None, needs=DRAWN)
    """Name of the project in the charts. Unset is network_train."""
    wandb_run_name: str | None = option(None, needs="log_with=wandb|all")
    """Name of the run in wandb. Unset lets wandb choose."""
    log_tracker_config: str | None = option(None, path="file", needs=DRAWN)
    """TOML file with further settings of tensorboard and wandb, a table for each."""
    wandb_api_key: str | None = option(None, needs="log_with=wandb|all", secret=True, logged=False)
    """Key to log in to wandb with. Unset uses the one that is logged in."""
    profile: int = option(0, kind=whole(0))
    """Write a trace of this many steps, from the third on, into --output_dir: a timeline of CPU and GPU for Perfetto. 0
    writes none."""
    log_config: bool = option(False, needs=DRAWN)
    """Send the options to the charts too, without passwords and folder names."""
