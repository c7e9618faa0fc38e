"""--network_module networks.lora_anima: LoRA for Anima, which is what networks.lora makes for any base model."""

from networks.core.factory import Kind, network_module
from networks.core.kinds.lora import LowRank

create_network, create_network_from_weights = network_module(Kind(LowRank))
