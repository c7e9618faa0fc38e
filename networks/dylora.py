"""Network module for DyLoRA, an adapter that can be cut to a smaller rank after training."""

from networks.core.kinds.dylora import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
