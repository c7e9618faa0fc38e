"""The evaluations of a run that later evaluations, the choice of a file and a resumed run need.

Letters: N rows, each a held-out image; L noise levels; G images, each of which may have several rows.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from library.training.evaluation.choice import average_by_image, is_clearly_worse
from library.training.evaluation.validation_loss import Difference, Name, estimate_paired_difference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The losses of one evaluation, unweighted."""

    step: int  # finished optimizer steps
    losses_NL: Tensor  # float64, on the CPU

    @property
    def mean(self) -> float:
        return self.losses_NL.mean().item()

    @property
    def level_means(self) -> list[float]:
        return list(self.losses_NL.mean(0).tolist())


@dataclass
class ValidationRecord:
    """The first, last and best evaluation, and each row's losses at the steps that are still needed."""

    images: Sequence[Name]  # identifies the image of each row
    fingerprint: str  # digest of the measurement's images and settings
    first: Evaluation | None = None
    last: Evaluation | None = None  # of this process, not of the resumed run
    best_step: int = 0
    best_loss: float = inf
    measured_step: int | None = None  # of the last evaluation, also across a resume
    num_evaluations: int = 0
    num_worse: int = 0  # consecutive last evaluations that are significantly worse than the best
    row_losses: dict[int, list[float]] = field(default_factory=dict)  # by step
    is_resumed: bool = False

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest evaluation; None before the first."""
        return None if self.best_loss == inf else (self.best_step, self.best_loss)

    @property
    def difference(self) -> Difference | None:
        """The last evaluation's difference to the first; None for the first."""
        if self.first is None or self.last is None or self.last is self.first:
            return None
        return estimate_paired_difference(self.last.losses_NL, self.first.losses_NL, self.images)

    def add(self, evaluation: Evaluation) -> None:
        step = evaluation.step
        self.last, self.measured_step = evaluation, step
        self.first = self.first or evaluation
        if evaluation.mean < self.best_loss:
            self.best_step, self.best_loss = step, evaluation.mean
        self.row_losses[step] = evaluation.losses_NL.mean(1).tolist()
        self.num_evaluations += 1
        is_worse = self.best_step in self.row_losses and is_clearly_worse(
            self.image_losses(step), self.image_losses(self.best_step), max(1, self.num_evaluations - 1)
        )
        self.num_worse = self.num_worse + 1 if is_worse else 0

    def keep_steps(self, is_kept: Callable[[int], bool]) -> None:
        """Drop the losses after steps that are no longer compared."""
        self.row_losses = {step: losses for step, losses in self.row_losses.items() if is_kept(step)}

    def image_losses(self, step: int) -> Tensor:
        """Return each image's loss after `step`, shape G; its losses must be kept."""
        return average_by_image(torch.tensor(self.row_losses[step], dtype=torch.float64), self.images)

    def losses_after(self, step: int) -> list[float] | None:
        """Return each image's loss if `step` was measured last, else None."""
        is_known = step == self.measured_step and step in self.row_losses
        return self.image_losses(step).tolist() if is_known else None

    def last_losses(self) -> list[float] | None:
        """Return each image's loss at the last evaluation; None before the first."""
        return None if self.measured_step is None else self.losses_after(self.measured_step)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values; floats survive JSON unchanged."""
        first = None if self.first is None else {"step": self.first.step, "losses": self.first.losses_NL.tolist()}
        best = None if self.best is None else {"step": self.best_step, "loss": self.best_loss}
        return {
            "fingerprint": self.fingerprint,
            "first": first,
            "best": best,
            "measured_step": self.measured_step,
            "kept": self.row_losses,
            "counts": [self.num_evaluations, self.num_worse],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the comparisons of a state; start over if other images are measured."""
        self.is_resumed = True
        self.measured_step = state_dict["measured_step"]
        first, best = state_dict["first"], state_dict["best"]
        if state_dict["fingerprint"] != self.fingerprint:
            if first is not None:
                logger.warning(
                    "validation measures other images, noise levels or noise than in the state: it is compared with "
                    "its first evaluation from here on"
                )
            return
        if first is not None:
            self.first = Evaluation(int(first["step"]), torch.tensor(first["losses"], dtype=torch.float64))
        if best is not None:
            self.best_step, self.best_loss = int(best["step"]), float(best["loss"])
        # Older states have neither of these.
        self.row_losses = {int(step): losses for step, losses in state_dict.get("kept", {}).items()}
        self.num_evaluations, self.num_worse = state_dict.get("counts", (0, 0))
