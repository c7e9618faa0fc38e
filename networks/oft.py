"""OFT that turns outputs, as sd-scripts' OFT modules do; it trains their files further."""

from networks.core.kinds.oft import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
