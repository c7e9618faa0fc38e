"""Names of NextDiT's weights in the original layout, which is ours, and in diffusers'.

A weight of ours stacks several of diffusers'.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from library.checkpoints.fused_tensors import joined
from library.checkpoints.weights import Weights

STACKS = ("context_refiner", "noise_refiner", "layers")


@dataclass(frozen=True)
class NextDitKeys:
    """Our paths of layers and, for each, those of diffusers, in one base model."""

    top: Mapping[str, str]
    block: Mapping[str, tuple[str, ...]]
    context_block: Mapping[str, tuple[str, ...]]  # of the stack without modulation
    parameters: tuple[str, ...] = ()  # of the model itself, which have one name everywhere

    def sources(self, path: str) -> tuple[str, ...]:
        """Return diffusers' paths of the layers that make up one of ours; raises KeyError for other paths."""
        stack, _, rest = path.partition(".")
        if stack not in STACKS:
            return (self.top[path],)
        number, _, layer = rest.partition(".")
        names = (self.context_block if stack == "context_refiner" else self.block)[layer]
        return tuple(f"{stack}.{number}.{name}" for name in names)

    def source_keys(self, key: str) -> tuple[str, ...]:
        """Return diffusers' names of the weights that make up one of ours."""
        if key in self.parameters:
            return (key,)
        path, _, leaf = key.rpartition(".")
        return tuple(f"{name}.{leaf}" for name in self.sources(path))

    def candidates(self, names: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Yield our names of the weights that a model in diffusers' layout may have."""
        paths = list(self.top)
        for stack in STACKS:
            numbers = sorted({int(name.split(".")[1]) for name in names if name.startswith(f"{stack}.")})
            paths += [f"{stack}.{number}.{layer}" for number in numbers for layer in self.block]
        yield from (f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias"))

    def from_diffusers(self, weights: Weights) -> Weights:
        """Rename a model in diffusers' layout to our names, joining each tensor when it is read.

        Raises UserError naming missing parts of an incomplete layer.
        """
        return joined(weights, {key: self.source_keys(key) for key in self.candidates(weights.shapes)})

    def is_linear(self, path: str) -> bool:
        """Return True for the path of a Linear layer in the layout of the original checkpoint."""
        if not path.startswith(STACKS):
            return path in self.top and path != "cap_embedder.0"
        layer = path.partition(".")[2].partition(".")[2]
        return layer in self.block and "norm" not in layer

    def linear_paths(self, num_blocks: Mapping[str, int]) -> Iterator[str]:
        """Yield the path of every Linear layer, for these numbers of blocks by stack."""
        yield from filter(self.is_linear, self.top)
        for stack, count in num_blocks.items():
            own = [layer for layer in self.block if stack != "context_refiner" or not layer.startswith("adaLN")]
            yield from filter(self.is_linear, (f"{stack}.{n}.{layer}" for n in range(count) for layer in own))
