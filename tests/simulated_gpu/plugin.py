"""pytest on a simulated GPU: `python -m pytest -p tests.simulated_gpu.plugin -m gpu`.

A test fails if the simulation finds a fault. Tests marked `real_kernels` are skipped. If no GPU can be simulated,
one line gives the reason and nothing is run.
"""

import gc
from collections.abc import Iterator

import pytest

from tests.simulated_gpu.build import obstacle
from tests.simulated_gpu.device import Settings, Simulation, insert

SIMULATION = pytest.StashKey[Simulation]()
MOST_SHOWN = 6


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Exit successfully before collection if no GPU can be simulated."""
    reason = obstacle()
    if reason is None:
        return None
    print(f"simulated GPU: its tests are skipped, as {reason}")
    return int(pytest.ExitCode.OK)


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "add noise to attention's backward pass, as atomic adds do outside deterministic mode"
    parser.addoption("--simulate_atomics", action="store_true", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SIMULATION] = insert(Settings(has_atomics=config.getoption("--simulate_atomics")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs the kernels of a real GPU")
    for item in items:
        if item.get_closest_marker("real_kernels"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that passed if the simulation found faults."""
    simulation = item.config.stash[SIMULATION]
    simulation.clear()
    yield
    gc.collect()  # free the test's objects now, not during a later test
    simulation.extension.synchronize(0)
    faults = simulation.faults()
    if faults and not item.get_closest_marker("provokes_faults"):
        shown = [str(fault) for fault in faults[:MOST_SHOWN]]
        pytest.fail("\n".join([f"{len(faults)} faults on the simulated GPU", *shown]), pytrace=False)
