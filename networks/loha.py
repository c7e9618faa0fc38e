"""--network_module networks.loha: LoHa, two low-rank products multiplied number by number, on any base model."""

from networks.core.factory import network_module
from networks.core.kinds.loha import DOOR

create_network, create_network_from_weights = network_module(DOOR)
