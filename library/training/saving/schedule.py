"""The steps and epochs after which weights and states are saved, and whose files that outdates."""

from dataclasses import dataclass, replace

from library.options.output.saving import SavingOptions, StateOptions


@dataclass(frozen=True)
class Schedule:
    """The steps and epochs after which to save; None means never."""

    every_n_steps: int | None
    every_n_epochs: int | None
    keep_steps: int | None
    keep_epochs: int | None
    num_epochs: int

    @classmethod
    def build(cls, options: SavingOptions, num_epochs: int) -> "Schedule":
        """Read the intervals from the options; --save_n_epoch_ratio R saves about R times in the run and overrides
        the number of epochs."""
        every = options.save_every_n_epochs or None
        if options.save_n_epoch_ratio is not None and options.save_n_epoch_ratio > 0:
            every = num_epochs // options.save_n_epoch_ratio or 1
        return cls(
            options.save_every_n_steps or None,
            every,
            options.save_last_n_steps or None,
            options.save_last_n_epochs or None,
            num_epochs,
        )

    def saves_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def saves_epoch(self, epoch: int) -> bool:
        """Return True if a file is saved after an epoch; the final file replaces that of the last epoch."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0 and epoch < self.num_epochs

    def for_states(self, options: StateOptions) -> "Schedule":
        """Return the schedule of states, which may be kept for longer or shorter than weights."""
        return replace(
            self,
            keep_steps=options.save_last_n_steps_state or self.keep_steps,
            keep_epochs=options.save_last_n_epochs_state or self.keep_epochs,
        )

    def most_files(self, max_train_steps: int) -> int:
        """Return the largest number of files on disk at a time, without the final one."""
        after_steps = max_train_steps // self.every_n_steps if self.every_n_steps is not None else 0
        if self.every_n_steps is not None and self.keep_steps is not None:
            after_steps = min(after_steps, self.keep_steps // self.every_n_steps + 2)  # deleted after the new one
        after_epochs = (self.num_epochs - 1) // self.every_n_epochs if self.every_n_epochs is not None else 0
        if self.keep_epochs is not None:
            after_epochs = min(after_epochs, self.keep_epochs + 1)
        return after_steps + after_epochs

    def outdated_step(self, step: int) -> int | None:
        """Return the step whose file is deleted once that of `step` is written, by --save_last_n_steps."""
        if self.keep_steps is None or self.every_n_steps is None:
            return None
        # As in sd-scripts: --save_last_n_steps counts steps, not files.
        outdated = step - self.keep_steps - 1
        outdated -= outdated % self.every_n_steps
        return outdated if outdated > 0 else None

    def outdated_epoch(self, epoch: int) -> int | None:
        """Return the epoch whose file is deleted once that of `epoch` is written, by --save_last_n_epochs."""
        if self.keep_epochs is None or self.every_n_epochs is None:
            return None
        # As in sd-scripts: --save_last_n_epochs counts saved epochs.
        outdated = epoch - self.keep_epochs * self.every_n_epochs
        return outdated if outdated > 0 else None

    def outdates_stop(self, stop: int, step: int, epoch: int) -> bool:
        """Return True if the files of a run stopped after `stop` are outdated once those of `step` are written.

        They follow the limit in steps if steps are saved, else that in epochs; then `step` is the last one of `epoch`.
        """
        if self.every_n_steps is not None:
            return self.keep_steps is not None and stop < step - self.keep_steps
        outdated = self.outdated_epoch(epoch)
        return outdated is not None and stop <= outdated * step // epoch
