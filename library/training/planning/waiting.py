"""Which blocks of a denoiser can wait in main memory, and which layers can be stored in another form."""

from collections.abc import Collection, Sequence

from torch import nn


def storable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers inside the blocks of a model whose weights can be stored in another form."""
    blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    layers = (layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear)
    return list(dict.fromkeys(layers))


def waiting_places(blocks: Sequence[nn.Module], num_blocks: int) -> Collection[int]:
    """None can wait yet."""
    assert num_blocks == 0 and blocks
    return ()


def most_waiting(blocks: Sequence[nn.Module]) -> int:
    return 0 * len(blocks)
