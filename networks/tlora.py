"""Network module for T-LoRA: a LoRA in which fewer ranks act the noisier a sample is."""

from networks.core.kinds.tlora import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
