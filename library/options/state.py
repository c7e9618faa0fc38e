"""Training states, and going on from one."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class StateOptions(Options):
    """Training states, and going on from one."""

    save_state: bool = option(
        False,
        help="Save the training state with every saved file and at the end, so that the run can be continued.",
    )
    save_state_on_train_end: bool = option(False, help="Save the training state at the end only.")
    save_last_n_epochs_state: int | None = option(
        None,
        at_least=0,
        needs="save_state",
        help="Keep only the newest N states saved after epochs. Unset goes by --save_last_n_epochs.",
    )
    save_last_n_steps_state: int | None = option(
        None,
        at_least=0,
        needs="save_state",
        help="Delete states saved after steps once they are more than N steps old. Unset goes by --save_last_n_steps.",
    )
    resume: str | None = option(None, help="Folder of a saved training state to continue from.")
    autoresume: bool = option(
        False,
        unless="resume",
        help="Continue from the newest whole training state in --output_dir, or start at the beginning where there is "
        "none, so that the same command can be given again after any stop.",
    )
    skip_until_initial_step: bool = option(
        False,
        help="Skip the data of the steps before --initial_step or before the resumed state.",
    )
    initial_epoch: int | None = option(
        None,
        at_least=1,
        unless="initial_step",
        help="Epoch to begin with, counted from 1. The learning rate schedule still starts at its beginning.",
    )
    initial_step: int | None = option(
        None, at_least=0, help="Step to begin with, counted from 0. Wins over --initial_epoch."
    )
