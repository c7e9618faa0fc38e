"""Alias of networks.lora for FLUX.1."""

from networks.lora import create_network as create_network
from networks.lora import create_network_from_weights as create_network_from_weights
