"""The module networks.oft under its name for FLUX.1; here it knows every base model."""

from networks.oft import create_network as create_network
from networks.oft import create_network_from_weights as create_network_from_weights
