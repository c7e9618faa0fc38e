"""--network_module networks.lora_fa: LoRA-FA, where down factors stay as they start and up factors train."""

from networks.core.kinds import lora, tucker
from networks.core.kinds.kind import Door
from networks.core.kinds.lora_fa import frozen_down, frozen_split, warn_of_ratios
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(
    Door(
        frozen_down,
        make_core=tucker.Tucker,
        make_split=frozen_split,
        kinds=(lora.KIND, tucker.KIND),
        check=warn_of_ratios,
        takes=frozenset(("tlora",)),
        refuses={"use_tucker": "the core between the factors would train, and need what freezing lora_down saves"},
    )
)
