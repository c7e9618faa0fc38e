"""Layers of one module that get the same input, so that the products with their down factors can be one product."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import nn

SHARED_INPUTS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj", "mlp_in"),
    ("q", "k", "v"),
    ("wq", "wk", "wv", "gate"),
    ("w1", "w3"),
    ("gate", "up"),
    ("gate_proj", "up_proj"),
    ("gate_layer", "proj"),
)
"""Names of layers, in the order in which models call them. One that gets another input, such as the queries of
cross-attention, costs a product and is still right."""


def list_shared(downs: Mapping[str, nn.Linear]) -> Iterator[list[nn.Linear]]:
    """Yield down factors, which are given by the path of their layer, whose layers may get one input."""
    by_module = defaultdict[str, dict[str, nn.Linear]](dict)
    for path, down in downs.items():
        module, _, name = path.rpartition(".")
        by_module[module][name] = down
    for children in by_module.values():
        for names in SHARED_INPUTS:
            by_width = defaultdict[int, list[nn.Linear]](list)
            for name in names:
                if name in children:
                    by_width[children[name].in_features].append(children[name])
            yield from (group for group in by_width.values() if len(group) > 1)
