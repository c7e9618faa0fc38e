"""--network_module networks.lora: LoRA on the Linear and convolution layers of any base model."""

from networks.core.factory import Kind, network_module
from networks.core.kinds.lora import LowRank

create_network, create_network_from_weights = network_module(Kind(LowRank))
