"""--network_module networks.boft: BOFT, products of sparse orthogonal blocks that turn inputs, on any base model."""

from networks.core.kinds.rotations.boft import DOOR
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(DOOR)
