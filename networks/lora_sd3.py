"""--network_module networks.lora_sd3: LoRA, as networks.lora has it for every base model, under its name for SD3."""

from networks.core.factory import Kind, network_module
from networks.core.kinds.lora import LowRank

create_network, create_network_from_weights = network_module(Kind(LowRank))
