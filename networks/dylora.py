"""--network_module networks.dylora: DyLoRA, an adapter that can be cut to a smaller rank after training."""

from networks.core.factory import Kind, network_module
from networks.core.kinds.dylora import NestedRank, check_units, draw_rank

create_network, create_network_from_weights = network_module(
    Kind(
        NestedRank,
        check=check_units,
        start_step=draw_rank,
        refuses={
            "dora_wd": "the magnitudes of DoRA belong to one rank, so a file cut at another computes something else",
            "split_qkv": "a file cut at a smaller rank would hold the first projections only",
            "use_tucker": "the core between the factors mixes all ranks, so the first of them are no adapter alone",
        },
    )
)
