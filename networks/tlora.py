"""--network_module networks.tlora: T-LoRA, a LoRA of which fewer ranks act the noisier a sample is."""

from dataclasses import replace

from networks.core.network.factory import network_module
from networks.lora import DOOR

create_network, create_network_from_weights = network_module(replace(DOOR, is_tlora=True))
