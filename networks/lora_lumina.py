"""--network_module networks.lora_lumina: LoRA for Lumina Image 2.0, as networks.lora makes it for any."""

from networks.core.factory import Kind, network_module
from networks.core.kinds.lora import LowRank

create_network, create_network_from_weights = network_module(Kind(LowRank))
