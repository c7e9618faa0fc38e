"""Thinning the recorded values of long runs."""

import json
import random
from itertools import pairwise

import pytest

from library.training.report_page.thinning import DIGITS, MOST_BUCKETS, Curves, Kept


@pytest.mark.parametrize("num_steps", [7, MOST_BUCKETS, MOST_BUCKETS + 1, 13_577])
def test_buckets_hold_mean_minimum_and_maximum_of_their_steps(num_steps: int) -> None:
    """Compare with all values at once; resuming from a report in between changes nothing."""
    rng = random.Random(num_steps)
    values = {step: rng.lognormvariate(0, 2) for step in range(1, num_steps + 1) if rng.random() > 0.05}
    curves, stop = Curves(), rng.randrange(1, num_steps)
    for step in range(1, num_steps + 1):
        curves.add(step, {"loss": values.get(step), "rate": 0.5})
        if step == stop:
            curves = Curves.from_json(json.loads(json.dumps(curves.as_json())))
    column = curves.as_json()["columns"]["loss"]
    width, length = curves.width, len(column["total"])
    assert (length <= MOST_BUCKETS and width == 1) or length > MOST_BUCKETS // 2 - 1
    for bucket in range(length):
        bucket_values = [values[step] for step in range(bucket * width + 1, (bucket + 1) * width + 1) if step in values]
        if not bucket_values:
            assert column["total"][bucket] is None
            continue
        near = pytest.approx
        assert column["total"][bucket] == near(sum(bucket_values), rel=len(bucket_values) * 10 ** (1 - DIGITS))
        if width > 1:
            bucket_limits = column["low"][bucket], column["high"][bucket], column["count"][bucket]
            assert bucket_limits == (
                near(min(bucket_values), rel=10 ** (1 - DIGITS)),
                near(max(bucket_values), rel=10 ** (1 - DIGITS)),
                len(bucket_values),
            )
    rates = curves.as_json()["columns"]["rate"]
    assert ("low" in rates) == (width > 1)


def test_steps_after_a_cut_are_dropped() -> None:
    curves = Curves()
    for step in range(1, 31):
        curves.add(step, {"loss": float(step)})
    curves.cut(12)
    assert curves.by_name["loss"].total == [float(step) for step in range(1, 13)]
    curves.add(13, {"loss": 99.0})
    assert curves.by_name["loss"].total[-1] == 99.0
    curves.cut(0)
    assert curves.by_name["loss"].total == []


@pytest.mark.parametrize("count", [1, 5, 6, 40, 1001])
def test_a_list_keeps_the_first_the_last_and_evenly_spaced_items(count: int) -> None:
    thinned = Kept(limit=5)
    for step in range(count):
        thinned.add({"step": step})
        assert thinned.items[-1]["step"] == step and thinned.items[0]["step"] == 0 and len(thinned.items) <= 5
        thinned = Kept.from_json(5, json.loads(json.dumps(thinned.as_json())))
    steps = [item["step"] for item in thinned.items]
    assert len(steps) == min(count, 5) or len(steps) >= 3
    distances = {b - a for a, b in pairwise(steps[:-1])}
    assert len(distances) <= 1, "all but the last are equally far apart"
