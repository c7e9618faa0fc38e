"""Option values out of range are refused before anything is loaded."""

from typing import Any

import pytest

from library.architectures.sd3.options import Sd3TrainingOptions
from library.base.errors import UserError
from library.options.ranges import check_ranges
from library.options.training.flow import FlowSamplingOptions, FlowWeightingOptions
from library.options.training.optimizer import ScheduleOptions


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [("lr_scheduler_min_lr_ratio", 2.0, "use 0 to 1"), ("lr_scheduler_power", -1.0, "use at least 0")],
)
def test_a_schedule_number_out_of_range_is_named(name: str, value: float, fix: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is {value}; .*{fix}"):
        check_ranges(ScheduleOptions(**{name: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FlowSamplingOptions(sigmoid_scale=-1.0), "--sigmoid_scale is -1.0; use at least 0"),
        (FlowSamplingOptions(discrete_flow_shift=0.0), "--discrete_flow_shift is 0.0; use a number above 0"),
        (FlowWeightingOptions("logit_normal", logit_std=-0.1), "--logit_std is -0.1; use at least 0"),
        (FlowWeightingOptions("mode", mode_scale=2.0), "--mode_scale is 2.0; use at most 1.75"),
        (Sd3TrainingOptions(training_shift=-3.0), "--training_shift is -3.0; use a number above 0"),
    ],
)
def test_a_number_that_gives_no_valid_noise_levels_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_ranges(options)
