"""Network module for LoRA-FA: down factors are frozen, and only up factors are trained."""

from networks.core.kinds.lora_fa import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
