"""LoHa, two low-rank products multiplied number by number, on any base model."""

from networks.core.kinds.loha import KIND
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(KIND)
