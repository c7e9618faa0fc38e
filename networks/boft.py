"""Network module for BOFT: layer inputs rotated by products of sparse orthogonal blocks, on any base model."""

from networks.core.kinds.boft import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
