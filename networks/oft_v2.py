"""--network_module networks.oft_v2: OFT, orthogonal blocks that turn the inputs of layers, on any base model."""

from networks.core.kinds.rotations.oft_v2 import DOOR
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(DOOR)
