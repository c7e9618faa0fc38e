"""Bytes of frozen weights, from their shapes."""

from torch import Tensor, nn


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """The parameters and buffers of some modules; one that several have comes once."""
    return list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())


def bytes_of(*modules: nn.Module) -> int:
    """Bytes of the parameters and buffers of some modules."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(*modules))


def stored_layers(module: nn.Module) -> list[nn.Module]:
    """The layers whose weights can be stored in another form and wait in main memory: Linear and Conv2d."""
    return [layer for layer in module.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
