"""The fuzz tests with ten thousand examples in total, different ones each time."""

import os
import re
import subprocess
import sys

import pytest

from tests.running import ROOT

ALL_EXAMPLES = 10_000


@pytest.mark.nightly
def test_ten_thousand_examples_end_without_a_traceback() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not nightly", "tests/fuzz"]
    listed = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True)
    num_tests = len(re.findall(r"::test_", listed.stdout))
    environment = {**os.environ, "FUZZ_EXAMPLES": str(-(-ALL_EXAMPLES // num_tests))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:]
