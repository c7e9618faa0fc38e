"""LoRA-FA, where down factors stay as they start and up factors train."""

from networks.core.kinds.lora_fa import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
