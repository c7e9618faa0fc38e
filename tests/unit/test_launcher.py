"""Thread and CUDA allocator settings that must be set before torch is imported."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.base import launcher
from tests.running import ROOT, STARTED
from tests.tiers import first_is_fast

AT_THE_IMPORT_OF_TORCH = """
import importlib.machinery, os, platform, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "torch" else None

    def create_module(self, spec):
        print(*map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_CUDA_ALLOC_CONF")))
        raise SystemExit(0)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Watch())
os.getloadavg = lambda: (0.0, 0.0, 0.0)
platform.release = lambda: "6.8.0-generic"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
GROWING = "expandable_segments:True"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch does not use libgomp")
@pytest.mark.parametrize("script", first_is_fast(STARTED))
@pytest.mark.parametrize(
    ("user_settings", "expected"),
    [
        ({}, ["None", "10000", GROWING]),
        ({"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "backend:native"}, ["ACTIVE", "None", "None"]),
    ],
)
def test_scripts_set_the_variables_before_torch_is_imported(
    script: str, user_settings: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.toml"
    prompts.write_text('[[prompts]]\ntarget = "a cat"\naction = "erase"')
    data = ["--prompts_file", str(prompts)] if "leco" in script else ["--train_data_dir", ".", "--resolution", "64"]
    base = ["--pretrained_model_name_or_path", "sd", "--network_module", "networks.lora", "--output_dir", "out"]
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | user_settings
    command = [sys.executable, "-c", AT_THE_IMPORT_OF_TORCH, str(ROOT / f"{script}.py"), *base, *data]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, expected), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch does not use libgomp")
@pytest.mark.parametrize(
    ("load", "busy_cores", "policy", "spin_count"),
    [
        (0.1, 2.0, None, "10000"),  # an idle minute: a brief spike does not count
        (3.0, 0.1, None, "10000"),  # a program that has just ended
        (3.0, 1.0, "PASSIVE", None),
    ],
)
def test_threads_sleep_only_if_another_program_keeps_cores_busy(
    load: float, busy_cores: float, policy: str | None, spin_count: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(launcher, "count_busy_cores", lambda seconds: busy_cores)
    launcher.set_openmp_wait_policy()
    assert (environment.get("OMP_WAIT_POLICY"), environment.get("GOMP_SPINCOUNT")) == (policy, spin_count)


@pytest.mark.parametrize(
    ("system", "release", "user_settings", "expected"),
    [
        ("Linux", "6.8.0-48-generic", {}, {"PYTORCH_CUDA_ALLOC_CONF": GROWING}),
        ("Linux", "6.8.0-48-generic", {"PYTORCH_ALLOC_CONF": "a:b"}, {"PYTORCH_ALLOC_CONF": "a:b"}),
        ("Linux", "6.8.0-48-generic", {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ("Linux", "5.15.167.4-microsoft-standard-WSL2", {}, {}),
        ("Linux", "4.4.0-19041-Microsoft", {}, {}),
        ("Windows", "11", {}, {}),
        ("Darwin", "24.1.0", {}, {}),
    ],
)
def test_expandable_segments_are_used_on_native_linux_only(
    system: str, release: str, user_settings: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(user_settings)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    launcher.set_cuda_allocator()
    assert environment == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_busy_program_counts_as_a_busy_core() -> None:
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        assert launcher.count_busy_cores(0.5) > 0.5
    finally:
        program.kill()
        program.wait()
