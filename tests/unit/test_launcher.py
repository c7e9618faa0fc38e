"""What is set before torch is imported."""

import os
import subprocess
import sys

import pytest

from tests.running import ROOT, STARTED

AT_THE_IMPORT_OF_TORCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            raise SystemExit(0)

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", STARTED)
@pytest.mark.parametrize(("own", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_scripts_let_idle_threads_sleep_unless_the_user_says_otherwise(
    script: str, own: str | None, policy: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if own is not None:
        environment["OMP_WAIT_POLICY"] = own
    command = [sys.executable, "-c", AT_THE_IMPORT_OF_TORCH, str(ROOT / f"{script}.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, [policy]), done.stderr
