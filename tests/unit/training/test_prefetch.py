"""Prefetching one batch: the order of fetching, copying and use, and how errors are passed on."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from library.base.errors import UserError
from library.training.loop.ahead import Ahead, move_batch
from library.training.loop.loop import accumulate_gradients
from library.training.reporting.step_times import StepTimes
from library.training.step.accumulation import Window
from library.types import Batch
from tests.unit.training.test_loop import batch_of, run_of


class SlowCopies:
    """A device whose copies are NaN until they are waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.coming: dict[int, Batch] = {}

    def start(self, batch: Batch) -> Batch:
        copied = move_batch(batch, (), lambda tensor: torch.full_like(tensor, float("nan")))
        self.log.append(f"start {number_of(batch)}")
        self.coming[id(copied)] = batch
        return copied

    def ready(self, batch: Batch) -> None:
        batch_on_device = self.coming.pop(id(batch))
        assert batch.latents_BCHW is not None and batch_on_device.latents_BCHW is not None
        batch.latents_BCHW.copy_(batch_on_device.latents_BCHW)
        self.log.append(f"ready {number_of(batch_on_device)}")


def number_of(batch: Batch) -> int:
    return int(batch.keys[0])


def batches(count: int, log: list[str], broken: int = -1) -> Iterator[Batch]:
    for number in range(count):
        if number == broken:
            raise UserError(f"picture {number} is damaged")
        log.append(f"fetch {number}")
        yield replace(batch_of(1.0 + number), keys=[str(number)])


def test_a_batch_is_fetched_and_copied_while_the_previous_one_computes() -> None:
    log: list[str] = []
    run = run_of()
    ahead = Ahead(batches(4, log), 3, SlowCopies(log), run.times)

    def fetch() -> None:
        log.append("computes")
        ahead.fetch()

    losses = [accumulate_gradients(run, Window(i, 1, range(i, i + 1), False), ahead, fetch) for i in range(3)]
    assert log == [
        "fetch 0", "start 0", "ready 0", "computes",
        "fetch 1", "start 1", "ready 1", "computes",
        "fetch 2", "start 2", "ready 2", "computes",
    ]  # fmt: skip
    assert [float(loss) for loss in losses] == pytest.approx([(2 * x) ** 2 for x in (1.0, 2.0, 3.0)])
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_fetching_error_is_raised_when_the_batch_is_requested() -> None:
    ahead = Ahead(batches(3, [], broken=1), 3, None, StepTimes())
    assert number_of(next(ahead)) == 0
    ahead.fetch()
    for _ in range(2):
        with pytest.raises(UserError, match="picture 1 is damaged"):
            next(ahead)


def test_tensors_that_the_cpu_needs_stay_on_the_cpu() -> None:
    batch = replace(batch_of(2.0), conditioning={"mask": torch.ones(1, 3), "states": torch.ones(1, 3, 5)})
    copied = move_batch(batch, ("mask",), lambda tensor: tensor + 1)
    assert copied.conditioning is not None and batch.conditioning is not None
    assert copied.conditioning["mask"] is batch.conditioning["mask"]
    assert bool((copied.conditioning["states"] == 2).all()) and bool((copied.latents_BCHW == 3).all())  # type: ignore[union-attr]
    assert copied.sizes_B6 is batch.sizes_B6 and copied.pixels_BCHW is None
