"""--network_module networks.lora_qwen_image_21: LoRA for Qwen-Image 2.1, as networks.lora makes it for any."""

from networks.lora import create_network as create_network
from networks.lora import create_network_from_weights as create_network_from_weights
