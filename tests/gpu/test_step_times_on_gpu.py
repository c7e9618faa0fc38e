"""GPU time is measured on the GPU, and allocation retries are counted."""

import pytest
import torch

from library.memory.planner.measured import measure_peak_flops
from library.training.reporting.step_times import StepTimes, measure_pressure
from tests.gpu.device import DEVICE, ON_GPU
from tests.unit.training.test_step_times import batch_of

pytestmark = [*ON_GPU, pytest.mark.real_kernels]


def test_stage_times_are_those_of_their_gpu_kernels() -> None:
    """The host launches the long matmul at once; only GPU events measure its duration."""
    times = StepTimes(DEVICE, peak=measure_peak_flops(DEVICE, torch.bfloat16))
    matrix = torch.randn(4096, 4096, device=DEVICE)
    times.start()
    for _ in range(4):
        with times.counted(batch_of(1)) as turn_back:
            with times.stage("forward"):
                for _ in range(8):
                    matrix @ matrix
            turn_back()
            with times.stage("backward"):
                matrix @ matrix
        matrix.sum().item()
        times.end_step()
    assert times.summary() is not None and times.last is not None
    forward, backward = times.last.parts["forward"], times.last.parts["backward"]
    assert 0 < backward < forward < 2 * times.last.seconds
    if DEVICE.type == "cuda":
        assert 4 < forward / backward < 16
        assert measure_pressure(DEVICE)["retries"] >= 0 and times.chart_values()["speed/mfu"] > 0
