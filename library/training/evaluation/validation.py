"""Validation: when the pictures that are set aside are measured, what is said about it, and which weights were best.

Letters: N pictures, L noise levels.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.data.batches.validation_set import ValidationSet
from library.errors import few
from library.options.training.averaging import FILES, VALIDATION
from library.options.training.noise import NoiseOptions
from library.options.training.validation import ValidationOptions
from library.training.evaluation.choice import by_picture, is_clearly_worse
from library.training.evaluation.choosing import TOOL, Measured, choice_of
from library.training.evaluation.measurement import Measurement
from library.training.evaluation.validation_loss import Difference, noise_levels, paired_difference
from library.training.evaluation.without_side_effects import evaluating
from library.training.reporting import events
from library.training.reporting.progress import Progress
from library.training.reporting.trackers import Charts
from library.training.run_parts import Run
from library.training.saving.checkpoints import Schedule
from library.training.saving.saved_files import steps_of, without_copies

logger = logging.getLogger(__name__)

Kind = Literal["step", "epoch"]
BARS: Mapping[Kind, str] = {"step": "validation steps", "epoch": "epoch validation steps"}  # front ends know the names


@dataclass(frozen=True)
class Timetable:
    """When to measure; None is never."""

    at_first: bool
    every_n_steps: int | None
    every_n_epochs: int

    @classmethod
    def build(cls, options: ValidationOptions) -> "Timetable":
        """Measure after every epoch where nothing is said, also beside a number of steps."""
        return cls(
            options.validate_at_first, options.validate_every_n_steps or None, options.validate_every_n_epochs or 1
        )

    def due(self, step: int, ended_epoch: int | None) -> Iterator[Kind]:
        """Yield what is due after `step`, which may end an epoch."""
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            yield "step"
        if ended_epoch is not None and ended_epoch % self.every_n_epochs == 0:
            yield "epoch"


@dataclass(frozen=True)
class Evaluation:
    """The losses of one evaluation; every picture and every level counts the same."""

    step: int  # finished optimizer steps
    losses_NL: Tensor  # float64, on the CPU

    @property
    def mean(self) -> float:
        return self.losses_NL.mean().item()

    @property
    def level_means(self) -> list[float]:
        return list(self.losses_NL.mean(0).tolist())


def measurement_of(wanted: ValidationOptions, noise: NoiseOptions, pictures: ValidationSet, seed: int) -> Measurement:
    """Return what the options ask to measure; `seed` is that of the run, which one of the options replaces."""
    places = pictures.places_of(wanted.max_validation_steps or None)
    seed = seed if wanted.validation_seed is None else wanted.validation_seed
    return Measurement(pictures, places, noise_levels(noise), seed)


class Validation:
    """Measures the pictures that are set aside when it is due; does nothing where there are none.

    Every evaluation of a run sees the same pictures with the same captions, noise and noise levels, so what differs
    between two of them comes from the weights. Training goes on as if it had not taken place.
    """

    def __init__(self, run: Run, charts: Charts) -> None:
        options = run.options.validation
        self._run, self._charts = run, charts
        self._timetable = Timetable.build(options)
        self._measurement = measurement_of(options, run.options.noise, run.batches.validation, run.context.seed)
        self._rows, self._levels = self._measurement.rows, self._measurement.levels
        self._first: Evaluation | None = None
        self._last: Evaluation | None = None
        self._schedule = Schedule.build(run.options.saving, run.plan.num_epochs)
        self._kept: dict[int, list[float]] = {}  # by step the loss of each row where files are saved, and of the best
        self._patience = options.early_stop_patience or None
        self._num_evaluations = self._num_worse = 0  # the latter are the last ones, each clearly worse than the best
        self._measured_step: int | None = None  # of the last evaluation, also before a resume
        self._best_step, self._best_loss = 0, inf
        self._goes_on = False
        if not self.is_on and run.options.concepts is None:
            self._warn_of_idle_options()

    def _warn_of_idle_options(self) -> None:
        defaults = ValidationOptions.defaults()
        for name, value in self._run.options.validation.flat().items():
            if name != "validation_split" and value != defaults[name] and value not in (None, 0):
                logger.warning("--%s has no effect: no picture is set aside; --validation_split does that", name)

    @property
    def is_on(self) -> bool:
        return bool(self._rows)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest evaluation of the run; None before the first."""
        return None if self._best_loss == inf else (self._best_step, self._best_loss)

    @property
    def num_pictures(self) -> int:
        """Pictures that are set aside, measured or not."""
        return self._measurement.pictures.num_pictures

    # When

    def before_training(self, progress: Progress) -> bool:
        """Measure the start if that is wanted, or what was due when a resumed run was interrupted.

        Gives whether the loss is the lowest so far, as `after_step` does.
        """
        if not self.is_on:
            return False
        if progress.step == 0 and self._timetable.at_first:
            evaluation = self._measured("step", 0)
            self._draw_charts({"loss/validation/step_average": evaluation.mean}, 0, 0)
            return False  # an adapter that has not learned anything is not worth a file
        if self._goes_on and progress.step and self._measured_step != progress.step:
            epochs, rest = divmod(progress.step, self._run.plan.steps_per_epoch)
            return self.after_step(progress.step, epochs + bool(rest), not rest, progress.average.mean)
        return False

    def is_due(self, step: int) -> bool:
        """Return True if there is something to measure after `step`, its epoch left aside."""
        return self.is_on and any(self._timetable.due(step, None))

    def after_step(self, step: int, epoch: int, ends_epoch: bool, training_average: float) -> bool:
        """Measure if it is due after `step`, in `epoch`; gives whether the loss is the lowest so far.

        `training_average` is the running average of the training loss. To be called before anything is saved, so that
        the state of this step knows of it; with several processes by all of them.
        """
        is_best = False
        for kind in self._timetable.due(step, epoch if ends_epoch else None) if self.is_on else ():
            best_before = self._best_loss
            evaluation = self._measured(kind, step)
            is_best = is_best or evaluation.mean < best_before
            values = {
                f"loss/validation/{kind}_average": evaluation.mean,
                f"loss/validation/{kind}_divergence": evaluation.mean - training_average,
            }
            self._draw_charts(values, step, epoch, on_epochs=kind == "epoch")
        return is_best

    def _draw_charts(self, values: Mapping[str, float], step: int, epoch: int, on_epochs: bool = False) -> None:
        if self._charts.are_on:
            (self._charts.log_epoch if on_epochs else self._charts.log_step)(values, step, epoch)
            self._charts.log_step(self._details(), step, epoch)

    # What

    def _measured(self, kind: Kind, step: int) -> Evaluation:
        """The evaluation after `step`: a new one, or that which was just made."""
        if self._last is not None and self._last.step == step:
            return self._last
        evaluation = Evaluation(step, self._measure(BARS[kind]))
        self._report(evaluation)
        self._last, self._measured_step = evaluation, step
        self._first = self._first or evaluation
        if evaluation.mean < self._best_loss:
            self._best_step, self._best_loss = step, evaluation.mean
        self._kept[step] = evaluation.losses_NL.mean(1).tolist()
        self._count_worse(step)
        self._kept = {kept: losses for kept, losses in self._kept.items() if self._is_kept(kept)}
        self._run.events.emit(self._told(evaluation))
        return evaluation

    def _is_kept(self, step: int) -> bool:
        """Return True if the losses after `step` are used later: those of files, the start, the best and the last."""
        epochs, rest = divmod(step, self._run.plan.steps_per_epoch)
        ends_saved_epoch = not rest and self._schedule.saves_epoch(epochs)
        is_marked = step in (0, self._best_step, self._measured_step, self._run.plan.max_train_steps)
        return is_marked or ends_saved_epoch or self._schedule.saves_step(step)

    def _count_worse(self, step: int) -> None:
        """Take note of whether the evaluation after `step` is clearly worse than the best of all so far."""
        self._num_evaluations += 1
        is_worse = self._best_step in self._kept and is_clearly_worse(
            self._by_picture(step), self._by_picture(self._best_step), max(1, self._num_evaluations - 1)
        )
        self._num_worse = self._num_worse + 1 if is_worse else 0

    @property
    def ends_run(self) -> bool:
        """Return True if --early_stop_patience has run out."""
        return self._patience is not None and self._num_worse >= self._patience

    @property
    def why_it_ends(self) -> str:
        """The reason, in words."""
        return (
            f"the last {self._num_worse} validations were worse than that after step {self._best_step} by more than "
            f"chance (--early_stop_patience {self._patience})"
        )

    def choose(self, files: Sequence[Path]) -> events.Choice | None:
        """Compare the saved files, in the order of their steps, as far as they were measured; says which were not.

        None without validation, and where there is nothing to choose from.
        """
        averaging = self._run.options.averaging
        if not self.is_on or len(files) < 2:
            return None
        files = without_copies(files)
        are_same_weights = averaging.averages(FILES) == averaging.averages(VALIDATION)
        found = [(path, steps_of(path)) for path in files] if are_same_weights else []
        known = [(path, step) for path, step in found if step and step in self._kept]  # 0: the file does not say
        measured = [Measured(path, step, self._by_picture(step)) for path, step in known]
        if 0 in self._kept:
            measured.insert(0, Measured(None, 0, self._by_picture(0)))
        if missing := len(files) - sum(one.file is not None for one in measured):
            text = "%d of %d saved files were not measured as they are; %s measures them all"
            logger.info(text, missing, len(files), TOOL)
        return choice_of(measured) if sum(one.file is not None for one in measured) > 1 else None

    @property
    def num_evaluations(self) -> int:
        """How many there were."""
        return self._num_evaluations

    def losses_after(self, step: int) -> list[float] | None:
        """Of each picture, as they were measured after `step`; None where they were not."""
        return self._by_picture(step).tolist() if step == self._measured_step and step in self._kept else None

    def last_losses(self) -> list[float] | None:
        """Of each picture, at the last evaluation; None before there is one."""
        return None if self._measured_step is None else self.losses_after(self._measured_step)

    def _by_picture(self, step: int) -> Tensor:
        return by_picture(torch.tensor(self._kept[step], dtype=torch.float64), self._rows)

    def _measure(self, title: str) -> Tensor:
        """The losses of all pictures, shape NL."""
        run, num_threads = self._run, self._run.options.dataset.max_data_loader_n_workers
        return self._measurement.losses(run.context, run.processes, num_threads, title, evaluating(run, VALIDATION))

    def _difference(self) -> Difference | None:
        """How far the last evaluation lies above the first; None where it is the first."""
        if self._first is None or self._last is None or self._last is self._first:
            return None
        return paired_difference(self._last.losses_NL, self._first.losses_NL, self._rows)

    def _details(self) -> dict[str, float]:
        """What charts show of the last evaluation besides its average."""
        assert self._last is not None
        means = zip(self._levels, self._last.level_means, strict=True)
        values = {f"loss/validation/level_{level}": mean for level, mean in means}
        difference = self._difference()
        if difference is not None:
            values["loss/validation/difference"] = difference.mean
            values["loss/validation/difference_error"] = difference.standard_error
        return values

    def _report(self, evaluation: Evaluation) -> None:
        """One line in the log, and another one where a loss is not a number."""
        broken_N = ~evaluation.losses_NL.isfinite().all(1)
        if broken_N.any():
            names = few(self._measurement.labels[i] for i in broken_N.nonzero().flatten().tolist())
            logger.error("validation after step %d: the loss is not a number for %s", evaluation.step, names)
        levels = ", ".join(f"{t}: {x:.4f}" for t, x in zip(self._levels, evaluation.level_means, strict=True))
        place = f"after step {evaluation.step}" if evaluation.step else "before the first step"
        text = f"validation {place}: loss {evaluation.mean:.4f} on {len(self._rows)} pictures (noise level {levels})"
        logger.info("%s%s", text, "" if self._first is None else self._compared(evaluation, self._first))

    def _compared(self, evaluation: Evaluation, first: Evaluation) -> str:
        """How an evaluation stands to those before it, in words."""
        difference = paired_difference(evaluation.losses_NL, first.losses_NL, self._rows)
        error = "" if isnan(difference.standard_error) else f" ± {difference.standard_error:.4f}"
        doubt = "" if difference.is_clear else ", which may be chance"
        side = "below" if difference.mean < 0 else "above"
        rank = (
            "the lowest so far"
            if evaluation.mean < self._best_loss
            else f"the lowest was {self._best_loss:.4f} after step {self._best_step}"
        )
        return f"; {abs(difference.mean):.4f}{error} {side} that after step {first.step}{doubt}; {rank}"

    def _told(self, evaluation: Evaluation) -> events.Validation:
        """The event of an evaluation that is the last one by now."""
        zeros = torch.zeros_like(evaluation.losses_NL)
        errors = [
            finite(paired_difference(one, zeros[:, :1], self._rows).standard_error)
            for one in (evaluation.losses_NL, *evaluation.losses_NL.T[:, :, None])
        ]
        levels = zip(self._levels, evaluation.level_means, errors[1:], strict=True)
        difference = self._difference()
        compared = None
        if difference is not None and self._first is not None:
            error = finite(difference.standard_error)
            compared = events.Compared(self._first.step, difference.mean, error, difference.is_clear)
        return events.Validation(
            step=evaluation.step,
            loss=evaluation.mean,
            error=errors[0],
            levels=[events.Level(*level) for level in levels],
            num_pictures=len(self._rows),
            compared=compared,
            best_step=self._best_step,
            best_loss=finite(self._best_loss),
        )

    # Memory

    @property
    def _fingerprint(self) -> str:
        """What is measured, and how."""
        return blake2b(repr((self._rows, self._levels, self._measurement.seed)).encode(), digest_size=16).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Plain values; JSON gives every float back as it was."""
        first = None
        if self._first is not None:
            first = {"step": self._first.step, "losses": self._first.losses_NL.tolist()}
        best = None if self._best_loss == inf else {"step": self._best_step, "loss": self._best_loss}
        return {
            "fingerprint": self._fingerprint,
            "first": first,
            "best": best,
            "measured_step": self._measured_step,
            "kept": self._kept,
            "counts": [self._num_evaluations, self._num_worse],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on comparing with the first evaluation; where other pictures are measured the comparison starts afresh."""
        self._goes_on = True
        self._measured_step = state_dict["measured_step"]
        first, best = state_dict["first"], state_dict["best"]
        if state_dict["fingerprint"] != self._fingerprint:
            if first is not None:
                logger.warning(
                    "validation measures other pictures, noise levels or noise than in the state: it is compared with "
                    "its first evaluation from here on"
                )
            return
        if first is not None:
            self._first = Evaluation(int(first["step"]), torch.tensor(first["losses"], dtype=torch.float64))
        if best is not None:
            self._best_step, self._best_loss = int(best["step"]), float(best["loss"])
        self._kept = {int(step): losses for step, losses in state_dict.get("kept", {}).items()}
        self._num_evaluations, self._num_worse = state_dict.get("counts", (0, 0))


def finite(value: float) -> float | None:
    """The value, None where it is not a finite number."""
    return value if isfinite(value) else None
