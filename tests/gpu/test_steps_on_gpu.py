"""Batches that are copied to the GPU while it computes."""

from dataclasses import replace

import pytest
import torch

from library.memory.offload.readback import Readback
from library.training.loop.ahead import Ahead, CudaCopies
from library.training.reporting.step_times import StepTimes
from tests.gpu.device import DEVICE, GPU_ONLY, ON_GPU
from tests.unit.training.test_loop import batch_of

pytestmark = [*ON_GPU, GPU_ONLY, pytest.mark.slow]


def test_batches_copied_during_computation_arrive_complete() -> None:
    batches = [replace(batch_of(float(i)), latents_BCHW=torch.full((1, 4, 512, 512), float(i))) for i in range(8)]
    ahead = Ahead(iter(batches), len(batches), CudaCopies(DEVICE, ()), StepTimes(DEVICE))
    matrix, copied = torch.randn(4096, 4096, device=DEVICE), []
    for batch in ahead:
        assert batch.latents_BCHW is not None and batch.latents_BCHW.device.type == "cuda"
        matrix @ matrix  # the GPU is busy while the next batch is copied
        copied.append(Readback(torch.stack([batch.latents_BCHW.amin(), batch.latents_BCHW.amax()])))
        ahead.fetch()
    assert [readback.read() for readback in copied] == [[float(i), float(i)] for i in range(8)]
