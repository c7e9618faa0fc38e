"""An adapter that is ready to be trained, as the loop takes it."""

from dataclasses import dataclass

from library.training.evaluation.preview import Previews
from library.training.evaluation.validation import Validation
from library.training.reporting.progress import Progress
from library.training.reporting.trackers import Charts
from library.training.run_parts import Run
from library.training.saving.checkpoints import Writer
from library.training.saving.state import StateManifest


@dataclass(frozen=True)
class PreparedRun:
    """One adapter that is ready to be trained."""

    run: Run
    progress: Progress
    writer: Writer
    charts: Charts
    previews: Previews
    validation: Validation
    resumed: StateManifest | None  # the state, if the run goes on at its step
