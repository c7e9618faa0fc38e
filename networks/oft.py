"""Network module for OFT of outputs, as in sd-scripts' OFT modules, whose files it can train further."""

from networks.core.kinds.oft import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
