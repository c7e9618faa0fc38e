"""OFT, orthogonal blocks that turn the inputs of layers, on any base model."""

from networks.core.kinds.oft_v2 import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
