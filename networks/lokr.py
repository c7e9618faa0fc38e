"""Network module for LoKr: the Kronecker product of two small matrices, on any base model."""

from networks.core.kinds.lokr import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
