"""Lines and progress bars of a running training, in the form that graphical front ends parse.

Standard output and the progress bar are an interface; see tests/contracts/test_output.py.
"""

import logging
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from library.base.formatting import format_count
from library.base.launcher import launched_rank
from library.base.terminal import print_line
from library.checkpoints.relative_change import format_change
from library.training.step.accumulation import StepPlan

logger = logging.getLogger(__name__)


def announce(text: str) -> None:
    """Write a line to standard output and flush it; front ends look for these lines. Main process only."""
    if launched_rank() != 0:
        return
    try:
        print_line(text)
    except OSError as error:  # a full disk, or a closed pipe
        logger.debug("standard output takes nothing: %s", error)


@dataclass(frozen=True)
class ImageCounts:
    """The number of images in a run, including repeats."""

    train: int
    validation: int
    reg: int


def is_read_by_person() -> bool:
    """Return True if standard output is a terminal or a file; front ends read a pipe, and look there for lines of
    sd-scripts."""
    try:
        return sys.stdout.isatty() or stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError):  # a stream that a program has put in its place
        return False


def announce_run(plan: StepPlan, counts: ImageCounts, batch_sizes: Sequence[int], accumulation: int) -> None:
    sizes = ", ".join(str(size) for size in batch_sizes)
    if is_read_by_person():
        validation = f", {counts.validation} for validation" if counts.validation else ""
        reg = f", {counts.reg} for regularisation" if counts.reg else ""
        announce(f"training: {format_count(counts.train, 'image')} with repeats{validation}{reg}")
        every = f" of {accumulation} batches" if accumulation > 1 else ""
        epochs, steps = format_count(plan.num_epochs, "epoch"), format_count(plan.max_train_steps, "step")
        announce(f"  {epochs}, {steps}{every}, batch size {sizes}")
        return
    announce("running training / 学習開始")
    announce(f"  num train images * repeats / 学習画像の数×繰り返し回数: {counts.train}")
    announce(f"  num validation images * repeats / 学習画像の数×繰り返し回数: {counts.validation}")
    announce(f"  num reg images / 正則化画像の数: {counts.reg}")
    announce(f"  num batches per epoch / 1epochのバッチ数: {plan.num_batches}")
    announce(f"  num epochs / epoch数: {plan.num_epochs}")
    announce(f"  batch size per device / バッチサイズ: {sizes}")
    announce(f"  gradient accumulation steps / 勾配を合計するステップ数 = {accumulation}")
    announce(f"  total optimization steps / 学習ステップ数: {plan.max_train_steps}")


def announce_epoch(epoch: int, num_epochs: int) -> None:
    """Announce an epoch, counted from 1, on its own line above the progress bars."""
    with tqdm.external_write_mode():
        announce(f"epoch {epoch}/{num_epochs}")


class StepBar:
    """The progress bar `steps` on standard error, followed by the loss; of several adapters, the lowest."""

    def __init__(self, max_train_steps: int, finished_steps: int, is_shown: bool) -> None:
        # The description and smoothing=0 are sd-scripts'; front ends parse this bar.
        self._bar = tqdm(
            total=max_train_steps,
            initial=finished_steps,
            smoothing=0,
            desc="steps",
            dynamic_ncols=True,
            disable=not is_shown,
        )
        self._step = finished_steps

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show the finished steps and their `bar_values`."""
        self._bar.update(step - self._step)
        self._step = step
        self._bar.set_postfix(values)


def list_finished(
    trained: str,
    num_steps: int,
    seconds: float,
    file: Path,
    change: float | None,
    best: tuple[int, float] | None,
    best_file: Path,
) -> list[str]:
    """Describe what was trained, for how long, and where it was saved: the last lines of a complete run.

    `num_steps` were run in `seconds`, without those before a resume; `change` is relative to the base model's weights;
    `best` is (step, validation loss).
    """
    lines = [f"trained {trained}: {num_steps} steps in {duration(seconds)}"]
    if best is not None:
        kept = f": {best_file}" if best_file.is_file() else " (--keep_best_checkpoint keeps those weights)"
        lines.append(f"the validation loss was lowest after step {best[0]}, {best[1]:.4f}{kept}")
    lines.append(f"the adapter is {file}")
    return lines if change is None else [*lines, format_change(change)]


def duration(seconds: float) -> str:
    """Format a duration with at most two units: `1 h 02 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class LimitedNorms:
    """The effect of limiting weight norms after a step."""

    num_scaled: int
    mean: float
    maximum: float

    def chart_values(self) -> dict[str, float]:
        return {
            "max_norm/keys_scaled": self.num_scaled,
            "max_norm/max_key_norm": self.maximum,
            "norm/avg_key_norm": self.mean,
        }


def bar_values(average_loss: float, norms: LimitedNorms | None) -> dict[str, float]:
    """Return the values shown after the progress bar, in this order."""
    limited = {} if norms is None else {"Keys Scaled": norms.num_scaled, "Average key norm": norms.mean}
    return {**limited, "avr_loss": average_loss}


def rate_values(
    rates: Sequence[float], names: Sequence[str], effective: Sequence[float] | None, first_is_text_encoder: bool
) -> dict[str, float]:
    """Return a step's learning rates by their chart names.

    `lr/<name>` for every named group; otherwise `lr/textencoder` for the first group if a text encoder may train, and
    `lr/group<i>` for the others; also `lr/d*lr/<name>` and `lr/d*lr/group<i>` for optimizers that find the rate
    themselves.
    """
    values: dict[str, float] = {}
    for i, rate in enumerate(rates):
        values[f"lr/{names[i]}"] = float(rate)
        if effective is not None:
            values[f"lr/d*lr/{names[i]}"] = effective[i]
    for i, rate in enumerate(rates):
        # sd-scripts logs these names besides those of the groups, and dashboards may chart either.
        is_text_encoder = i == 0 and first_is_text_encoder
        values.setdefault("lr/textencoder" if is_text_encoder else f"lr/group{i}", float(rate))
        if effective is not None and not is_text_encoder:
            values.setdefault(f"lr/d*lr/group{i}", effective[i])
    return values
