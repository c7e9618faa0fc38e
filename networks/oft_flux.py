"""--network_module networks.oft_flux: goes on from its files, which networks.oft reads for any base model."""

from networks.oft import create_network as create_network
from networks.oft import create_network_from_weights as create_network_from_weights
