"""Curves and lists of bounded length, so that the report of a run with 100,000 steps stays small.

What is kept depends only on what was added, so a resumed report equals one built later from the events.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

MOST_BUCKETS = 1000  # of a curve; about the width of a chart in pixels
DIGITS = 7  # of stored numbers
COLUMNS = ("total", "low", "high", "count")


def round_value(value: float) -> float:
    """Round to `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


@dataclass
class Curve:
    """Sum, minimum, maximum and count of a value per bucket of steps; None where there is none."""

    total: list[float | None] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    count: list[int] = field(default_factory=list)

    def add(self, bucket: int, total: float, low: float, high: float, count: int) -> None:
        """Add `round_value` values to a bucket."""
        missing = bucket + 1 - len(self.count)
        if missing > 0:
            for column in (self.total, self.low, self.high):
                column += [None] * missing
            self.count += [0] * missing
        previous_total, previous_low, previous_high = self.total[bucket], self.low[bucket], self.high[bucket]
        if previous_total is not None and previous_low is not None and previous_high is not None:
            total, low, high = round_value(previous_total + total), min(previous_low, low), max(previous_high, high)
        self.total[bucket], self.low[bucket], self.high[bucket] = total, low, high
        self.count[bucket] += count

    def halved(self) -> "Curve":
        """Merge pairs of buckets."""
        curve = Curve()
        for bucket, values in enumerate(zip(self.total, self.low, self.high, self.count, strict=True)):
            total, low, high, count = values
            if total is not None and low is not None and high is not None:
                curve.add(bucket // 2, total, low, high, count)
        return curve


class SavedCurves(TypedDict):
    """`Curves` as plain values."""

    width: int
    columns: Mapping[str, Mapping[str, Sequence[float | None]]]


@dataclass
class Curves:
    """Several curves over the steps of a run with common buckets.

    A bucket spans `width` steps: one for up to `MOST_BUCKETS` steps, doubled whenever there would be more buckets.
    """

    width: int = 1
    by_name: dict[str, Curve] = field(default_factory=dict)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add the values of a step, from 1; None values are skipped."""
        while (step - 1) // self.width >= MOST_BUCKETS:
            self.width *= 2
            self.by_name = {name: curve.halved() for name, curve in self.by_name.items()}
        for name, value in values.items():
            if value is not None:
                # Rounded when added and not when saved, so that a report that is read back continues with the same
                # numbers.
                rounded = round_value(value)
                self.by_name.setdefault(name, Curve()).add((step - 1) // self.width, rounded, rounded, rounded, 1)

    def cut(self, step: int) -> None:
        """Drop the buckets after that of `step`."""
        num_kept = 0 if step < 1 else (step - 1) // self.width + 1
        for curve in self.by_name.values():
            for column in (curve.total, curve.low, curve.high, curve.count):
                del column[num_kept:]

    def as_json(self) -> dict[str, Any]:
        """Return plain values; minimum, maximum and count are omitted if every bucket has one value."""
        columns = {}
        for name, curve in self.by_name.items():
            column_names = COLUMNS if max(curve.count, default=0) > 1 else COLUMNS[:1]
            columns[name] = {column: getattr(curve, column) for column in column_names}
        return {"width": self.width, "columns": columns}

    @classmethod
    def from_json(cls, values: SavedCurves) -> "Curves":
        """Restore curves from `as_json`. Raises ValueError for columns that do not fit."""
        curves = cls(values["width"])
        for name, columns in values["columns"].items():
            totals = columns.get("total", ())
            if curves.width < 1 or any(len(column) != len(totals) for column in columns.values()):
                raise ValueError(f"the curve {name[:60]!r} has columns of several lengths")
            counts = columns.get("count") or [int(total is not None) for total in totals]
            lows, highs = (columns.get(column) or list(totals) for column in ("low", "high"))
            curves.by_name[name] = Curve(list(totals), list(lows), list(highs), [int(count or 0) for count in counts])
        return curves


class KeptItem(TypedDict):
    """The columns that every kept table has."""

    number: int  # index in the sequence
    step: int


class SavedKept(TypedDict):
    """`Kept` as plain values."""

    stride: int
    num_seen: int
    items: Sequence[KeptItem]


@dataclass
class Kept:
    """At most `limit` tables of a longer sequence: the first, the last, and evenly spaced ones between.

    Every `stride`-th is kept; if there are too many, every second one is dropped.
    """

    limit: int
    stride: int = 1
    num_seen: int = 0
    items: list[dict[str, Any]] = field(default_factory=list)  # "number" is the index in the sequence

    def add(self, item: Mapping[str, Any]) -> None:
        """Add the next table."""
        # The last table is kept whatever the stride, but only while it is the last.
        if self.items and self.items[-1]["number"] % self.stride:
            self.items.pop()
        self.items.append({"number": self.num_seen, **item})
        self.num_seen += 1
        while len(self.items) > self.limit:
            self.stride *= 2
            last = self.items[-1]
            self.items = [entry for entry in self.items if entry["number"] % self.stride == 0 or entry is last]

    def at_step(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return the last table if it is of the step of `item`, else add that."""
        if not self.items or self.items[-1]["step"] != item["step"]:
            self.add(item)
        return self.items[-1]

    def keep_up_to(self, step: int) -> None:
        self.items = [item for item in self.items if item["step"] <= step]

    def as_json(self) -> dict[str, Any]:
        return {"stride": self.stride, "num_seen": self.num_seen, "items": self.items}

    @classmethod
    def from_json(cls, limit: int, values: SavedKept) -> "Kept":
        """Restore from `as_json`."""
        return cls(limit, max(1, values["stride"]), values["num_seen"], [dict(item) for item in values["items"]])
