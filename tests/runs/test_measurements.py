"""Every measurement and maker of toys starts by its name; those that no other test runs measure once in small."""

import subprocess
import sys

import pytest

from benchmarks.runner import list_commands
from tests.running import ROOT

# The others: test_memory_modes (gpu_step), test_compile, made_up/test_a_new_weight_format, unit/tools/test_plan_models.
SMALL = {
    "adapters": ("--rounds 1 --rank 4", "LoRA-FA"),
    "denoisers": ("--models lumina --tokens 16 --passes 1", "lumina"),
    "own_overhead": ("--steps 2 --case plain", "overhead"),
    "quickstart": ("--steps 3 --rounds 1", "x the fastest"),
    "recipe_heads": ("", "Planned at 1024 px"),
    "run_duration": ("--steps 2 --only 1", "measured / planned"),
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["benchmarks", "benchmarks.toys"])
def test_a_name_that_there_is_not_is_answered_with_those_there_are(package: str) -> None:
    done = run(package, "speed", "--device", "cuda")
    assert done.returncode == 2 and all(name in done.stderr for name in list_commands(package))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("package", "name"), [(p, name) for p in ("benchmarks", "benchmarks.toys") for name in list_commands(p)]
)
def test_its_help_has_its_own_name(package: str, name: str) -> None:
    done = run(package, name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python3 -m {package} {name} ")


@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALL)
def test_it_measures_in_small(name: str) -> None:
    words, expected = SMALL[name]
    done = run("benchmarks", name, *words.split())
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
