"""pytest on a simulated GPU: `python -m pytest -p tests.simulated_gpu.plugin -m gpu`.

A test fails where the simulation finds a fault. Tests marked `real_kernels` are skipped. Where no GPU can be simulated
one line says why, and everything goes on without it.
"""

import gc
from collections.abc import Iterator

import pytest

from tests.simulated_gpu.build import obstacle
from tests.simulated_gpu.device import Simulation, insert

SIMULATION = pytest.StashKey[Simulation]()
MOST_SHOWN = 6


def pytest_configure(config: pytest.Config) -> None:
    reason = obstacle()
    if reason is None:
        config.stash[SIMULATION] = insert()


def pytest_report_header(config: pytest.Config) -> str:
    if SIMULATION in config.stash:
        return "simulated GPU: torch.cuda is simulated on the CPU"
    return f"simulated GPU: not used, {obstacle()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SIMULATION not in config.stash:
        return
    skip = pytest.mark.skip(reason="needs the kernels of a real GPU")
    for item in items:
        if item.get_closest_marker("real_kernels"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that passed although the simulation found faults."""
    simulation = item.config.stash.get(SIMULATION, None)
    if simulation is None:
        yield
        return
    simulation.clear()
    yield
    gc.collect()  # what the test dropped is freed in its own time, not in that of a later test
    simulation.extension.synchronize(0)
    found = simulation.faults()
    if found and not item.get_closest_marker("provokes_faults"):
        shown = [str(fault) for fault in found[:MOST_SHOWN]]
        pytest.fail("\n".join([f"{len(found)} faults on the simulated GPU", *shown]), pytrace=False)


@pytest.fixture
def simulated_gpu(request: pytest.FixtureRequest) -> Simulation:
    """The simulation; the test is skipped where there is none."""
    simulation = request.config.stash.get(SIMULATION, None)
    if simulation is None:
        pytest.skip("needs a simulated GPU: -p tests.simulated_gpu.plugin")
    return simulation
