"""Training states, and going on from one."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class StateOptions(Options):
    """Training states, and going on from one."""

    save_state: bool = option(False, help="")
    save_state_on_train_end: bool = option(False, help="")
    save_last_n_epochs_state: int | None = option(None, help="")
    save_last_n_steps_state: int | None = option(None, help="")
    resume: str | None = option(None, help="")
    skip_until_initial_step: bool = option(False, help="")
    initial_epoch: int | None = option(None, help="")
    initial_step: int | None = option(None, help="")
