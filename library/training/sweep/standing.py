"""Where the adapters of a sweep stand when it is over."""

from collections.abc import Iterator, Sequence

from library.training.loop.prepared import PreparedRun
from library.training.sweep.ranking import Measured
from library.training.sweep_record import SweepRecord


def collect_standing(prepared: Sequence[PreparedRun], sweep: SweepRecord) -> list[Measured]:
    """Collect what is known of each adapter: those that ended before a resume are told of by the record alone."""
    return [*of_record(prepared, sweep), *of_prepared(prepared)]


def of_record(prepared: Sequence[PreparedRun], sweep: SweepRecord) -> Iterator[Measured]:
    here = {one.run.label for one in prepared}
    for label, ended in sweep.ended.items():
        if label not in here:
            yield Measured(label, ended.step, ended.losses_G, ended.why, None)


def of_prepared(prepared: Sequence[PreparedRun]) -> Iterator[Measured]:
    for one in prepared:
        path = one.writer.names.of_end()
        file = path.name if path.exists() else None
        losses_G = one.validation.record.last_losses()
        yield Measured(one.run.label, one.progress.step, losses_G, one.progress.ended, file)
