"""The planner's prediction matches the growth of a real process: a U-Net of SD 1.5's size on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SHARE = 0.07  # the allocator's rounding and the workspaces of oneDNN, measured: 4 to 6 % in float32


@pytest.mark.nightly
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured anew")
@pytest.mark.parametrize(("side", "recomputes"), [(256, 0), (512, 1)])
def test_a_step_of_sd15_grows_the_process_by_the_planned_bytes(side: int, recomputes: int) -> None:
    command = [sys.executable, "-m", "tests.unit.memory.planner.sd15_step", str(side), str(recomputes)]
    # Return freed memory to the system at once: arenas that keep it would count as growth.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=500)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["planned"] == pytest.approx(measured["grown"], rel=SHARE)
