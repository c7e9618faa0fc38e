"""LoRA for Anima, which is what networks.lora makes for any base model."""

from networks.lora import create_network as create_network
from networks.lora import create_network_from_weights as create_network_from_weights
