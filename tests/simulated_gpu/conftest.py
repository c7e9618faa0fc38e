"""The simulation as a fixture."""

import pytest

from tests.simulated_gpu.device import Simulation
from tests.simulated_gpu.plugin import SIMULATION


@pytest.fixture
def simulated_gpu(request: pytest.FixtureRequest) -> Simulation:
    """The simulated GPUs of this process; without the plugin the test is skipped."""
    simulation = request.config.stash.get(SIMULATION, None)
    if simulation is None:
        pytest.skip("needs -p tests.simulated_gpu.plugin")
    return simulation
