"""--network_module networks.oft: goes on from files of sd-scripts' OFT modules and of LyCORIS's diag-oft."""

from networks.core.factory import network_module
from networks.core.kinds.oft import DOOR

create_network, create_network_from_weights = network_module(DOOR)
