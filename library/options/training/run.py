"""Options for the length and the seed of a run, and for failures."""

from dataclasses import dataclass
from math import ceil

from library.options.base import Options, option
from library.options.kinds import whole

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class RunOptions(Options):
    """Length and seed of the run."""

    max_train_steps: int = option(1600, usual=True, kind=whole(1), on_resume="new length")
    """Number of optimizer steps to train. --max_train_epochs wins when set."""
    max_train_epochs: int | None = option(
        None,
        on_resume="new length",
        usual=True,
        kind=whole(1),
        zero_is_unset=True,
        refused_by_leco="a run that is trained by prompts alone has steps and no epochs; use --max_train_steps",
    )
    """Number of passes over all images and their repeats. Unset goes by --max_train_steps."""
    seed: int | None = option(None, usual=True, kind=whole(-MAX_SEED, MAX_SEED), kept_in_state=True, short_name="seed")
    """Seed of all random numbers, so that a run can be repeated. Unset draws one."""
    gradient_accumulation_steps: int = option(1, usual=True, kind=whole(1))
    """Batches that are averaged for one optimizer step. Acts like a larger batch without needing its memory."""

    def planned_steps(self, num_batches: int, num_processes: int) -> int:
        """Return the number of optimizer steps of a run with `num_batches` per epoch; --max_train_epochs overrides
        --max_train_steps."""
        if self.max_train_epochs is None:
            return self.max_train_steps
        return self.max_train_epochs * ceil(num_batches / (self.gradient_accumulation_steps * num_processes))


@dataclass(frozen=True)
class DiagnosticOptions(Options):
    """Failures of a run, and checks before it starts."""

    on_nonfinite: str = option("skip", choices=("skip", "stop"))
    """What to do with a step whose loss or gradient is NaN or infinite: skip leaves the weights as they were and stops
    after a handful in a row, stop ends the run at the first one."""
    trace_nonfinite: bool = option(False, affects_training=False)
    """Repeat the first step whose loss or gradient is NaN or infinite, and name the module where it begins. Costs
    nothing before that step."""
    exit_status_on_stop: bool = option(False, affects_training=False)
    """End with status 130, 143 or 129 when Ctrl-C, SIGTERM or SIGHUP stopped the run before its last step, so that a
    command after && is not started. Unset ends with 0, because the run is saved."""
    deterministic: bool = option(False)
    """Make two runs with the same seed on the same GPU bitwise equal, by kernels that add in a fixed order; steps may
    take longer. An operation without such a kernel ends the run. Runs on the CPU always are equal."""
    selftest: bool = option(False, affects_training=False)
    """Before training, compute one batch with --blocks_to_swap, --base_format, --gradient_checkpointing and similar
    options, and once more block by block without them. Compare the gradients, and end the run if they differ by more
    than the rounding error of the number format."""
    dry_run: bool = option(False, usual=True, affects_training=False)
    """Load and check everything, train the largest batch for one step, show memory, parameters and steps, and stop
    without writing a file."""
