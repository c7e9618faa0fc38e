"""--network_module networks.lora_fa: LoRA-FA, where down factors stay as they start and up factors train."""

from networks.core.factory import Kind, network_module
from networks.core.kinds.lora_fa import frozen_down, frozen_split, warn_of_ratios

create_network, create_network_from_weights = network_module(
    Kind(
        frozen_down,
        make_split=frozen_split,
        check=warn_of_ratios,
        refuses={"use_tucker": "the core between the factors would train, and need what freezing lora_down saves"},
    )
)
