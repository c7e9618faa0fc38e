"""Network module for LoHa: the elementwise product of two low-rank products, on any base model."""

from networks.core.kinds.loha import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
