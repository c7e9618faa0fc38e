"""Batches that are copied to the GPU while it computes."""

from dataclasses import replace

import pytest
import torch

from library.memory.offload.readback import Readback
from library.training.loop.ahead import Ahead, CudaCopies
from library.training.reporting.step_times import StepTimes
from tests.gpu.card import CARD_ONLY, DEVICE, ON_CARD
from tests.unit.training.test_loop import batch_of

pytestmark = [*ON_CARD, CARD_ONLY, pytest.mark.slow]


def test_batches_that_are_copied_meanwhile_arrive_whole() -> None:
    given = [replace(batch_of(float(i)), latents_BCHW=torch.full((1, 4, 512, 512), float(i))) for i in range(8)]
    ahead = Ahead(iter(given), len(given), CudaCopies(DEVICE, ()), StepTimes(DEVICE))
    matrix, found = torch.randn(4096, 4096, device=DEVICE), []
    for batch in ahead:
        assert batch.latents_BCHW is not None and batch.latents_BCHW.device.type == "cuda"
        matrix @ matrix  # the card is busy while the next batch comes
        found.append(Readback(torch.stack([batch.latents_BCHW.amin(), batch.latents_BCHW.amax()])))
        ahead.fetch()
    assert [readback.read() for readback in found] == [[float(i), float(i)] for i in range(8)]
