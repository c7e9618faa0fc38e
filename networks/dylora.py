"""--network_module networks.dylora: DyLoRA, an adapter that can be cut to a smaller rank after training."""

from networks.core.changes.qkv_split import SplitRank
from networks.core.kinds import lora, tucker
from networks.core.kinds.dylora import NestedRank, check_units, draw_rank
from networks.core.kinds.kind import Door
from networks.core.network.factory import network_module

create_network, create_network_from_weights = network_module(
    Door(
        NestedRank,
        make_core=tucker.Tucker,
        make_split=SplitRank,
        kinds=(lora.KIND, tucker.KIND),
        check=check_units,
        start_step=draw_rank,
        arguments=("unit", "conv_unit", "train_all_ranks"),
        refuses={
            "dora_wd": "the magnitudes of DoRA belong to one rank, so a file cut at another computes something else",
            "split_qkv": "a file cut at a smaller rank would hold the first projections only",
            "use_tucker": "the core between the factors mixes all ranks, so the first of them are no adapter alone",
        },
    )
)
