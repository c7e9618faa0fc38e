"""Alias of networks.lora, the name that sd-scripts 0.12 has for a LoRA of any base model."""

from networks.lora import create_network as create_network
from networks.lora import create_network_from_weights as create_network_from_weights
