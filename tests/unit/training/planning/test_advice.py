"""The advice when a step runs out of memory: fastest first, each option saving more than the previous one."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from library.memory.planner.choice import Allowed
from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import MemoryMode
from library.training.models.requests import RequestedRun
from library.training.planning import advice
from library.training.planning.advice import lines, memory_hints, pick_evenly
from tests.unit.memory.planner.test_choice import counted_step
from tests.unit.training.test_checks import make_options

LINE = re.compile(r"(--.*) needs ([\d.]+) GiB less and takes (?:(\d+) % longer|no longer)")


def hints(used: MemoryMode, **allowed: Any) -> list[tuple[str, float, int]]:
    matches = [LINE.fullmatch(line) for line in lines(counted_step(), used, Allowed(**allowed), TYPICAL[0])]
    return [(m[1], float(m[2]), int(m[3] or 0)) for m in matches if m is not None]


def test_each_line_saves_more_and_takes_longer_than_the_previous_one() -> None:
    advice = hints(MemoryMode(), weight_formats=(None, "nf4"))
    assert len(advice) >= 4
    assert [saved for _, saved, _ in advice] == sorted(saved for _, saved, _ in advice)  # to a tenth of a GiB
    assert [percent for *_, percent in advice] == sorted(percent for *_, percent in advice)


def test_recomputing_all_blocks_of_the_made_up_step_costs_a_third() -> None:
    """Each of 8 blocks keeps 300 MiB, or 10 if recomputed; the running block keeps all; the allocator adds 5 %."""
    options = [
        line for line in hints(MemoryMode(), offloads_inputs=(False,), recompute_every=(1,)) if "blocks" not in line[0]
    ]
    assert options == [("--gradient_checkpointing", round(7 * 290 * 1.05 / 1024, 1), 33)]


def test_options_already_in_use_are_not_advised() -> None:
    used = MemoryMode("nf4_double", 1, True, 6)
    assert hints(used, weight_formats=(None, "nf4_double")) == []


def test_a_long_list_of_advice_is_shortened() -> None:
    assert pick_evenly([str(i) for i in range(14)]) == ["1", "4", "7", "10", "13"]
    assert pick_evenly(["1", "2"]) == ["1", "2"]
    assert pick_evenly([]) == []


def test_third_party_modules_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "count_run", None)
    arch: Any = SimpleNamespace(text_cache=None)
    requested = RequestedRun.resolve(make_options(network_module="lycoris.kohya"), arch)
    run: Any = SimpleNamespace(context=SimpleNamespace(device=None))
    batch: Any = None  # counting would fail
    assert memory_hints(requested, run, batch) == []
