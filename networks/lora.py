"""Network module for LoRA on the Linear and convolution layers of any base model."""

from networks.core.kinds.lora import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
