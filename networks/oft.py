"""--network_module networks.oft: outputs are turned, as sd-scripts' OFT modules do; goes on from such files."""

from networks.core.kinds.oft import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
