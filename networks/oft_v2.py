"""Network module for OFT: layer inputs rotated by orthogonal blocks, on any base model."""

from networks.core.kinds.oft_v2 import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
