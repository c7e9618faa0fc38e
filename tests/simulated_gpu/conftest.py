"""The simulated GPUs as a fixture."""

import pytest

from tests.simulated_gpu.device import Simulation
from tests.simulated_gpu.plugin import SIMULATION


@pytest.fixture
def simulated_gpu(request: pytest.FixtureRequest) -> Simulation:
    """Return the simulated GPUs of this process; skip the test without the plugin."""
    simulation = request.config.stash.get(SIMULATION, None)
    if simulation is None:
        pytest.skip("needs -p tests.simulated_gpu.plugin")
    return simulation
