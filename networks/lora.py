"""--network_module networks.lora: LoRA on the Linear and convolution layers of any base model."""

from networks.core.delta import LowRank
from networks.core.factory import Kind, network_module

create_network, create_network_from_weights = network_module(Kind(LowRank))
