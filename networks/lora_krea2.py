"""--network_module networks.lora_krea2: LoRA for Krea 2, as networks.lora makes it for any."""

from networks.lora import create_network as create_network
from networks.lora import create_network_from_weights as create_network_from_weights
