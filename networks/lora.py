"""--network_module networks.lora: LoRA on the Linear and convolution layers of any base model."""

from networks.core.changes.qkv_split import SplitRank
from networks.core.kinds import lora, tucker
from networks.core.kinds.kind import Door
from networks.core.network.factory import network_module

DOOR = Door(
    lora.LowRank,
    make_core=tucker.Tucker,
    make_split=SplitRank,
    kinds=(lora.KIND, tucker.KIND),
    takes=frozenset(("ggpo_sigma", "ggpo_beta", "init", "tlora")),
)
create_network, create_network_from_weights = network_module(DOOR)
