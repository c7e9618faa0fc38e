"""Alias of networks.oft for FLUX.1."""

from networks.oft import create_network as create_network
from networks.oft import create_network_from_weights as create_network_from_weights
