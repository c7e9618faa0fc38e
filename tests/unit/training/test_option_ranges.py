"""Numbers of options that mean nothing are refused before anything is loaded."""

import pytest

from library.errors import UserError
from library.options.ranges import check_ranges
from library.options.training.optimizer import ScheduleOptions


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [("lr_scheduler_min_lr_ratio", 2.0, "use 0 to 1"), ("lr_scheduler_power", -1.0, "use at least 0")],
)
def test_a_schedule_number_out_of_range_is_named(name: str, value: float, way_out: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is {value}; .*{way_out}"):
        check_ranges(ScheduleOptions(**{name: value}))
