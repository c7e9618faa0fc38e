"""Names of the weights of transformers of double and single streams in the original layout, which is ours, and in
diffusers'.

A weight of ours stacks several of diffusers'.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from library.checkpoints.fused_tensors import joined
from library.checkpoints.weights import Weights

SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers has shift and scale in reverse order
ENDINGS = ("weight", "bias")


@dataclass(frozen=True)
class StreamKeys:
    """Our paths of layers and, for each, those of diffusers, in one base model."""

    top: Mapping[str, str]
    double: Mapping[str, tuple[str, ...]]
    single: Mapping[str, tuple[str, ...]]

    @property
    def stacks(self) -> tuple[tuple[str, str, Mapping[str, tuple[str, ...]]], ...]:
        """Our name and diffusers' of each list of blocks, and the layers of its blocks."""
        return (
            ("double_blocks", "transformer_blocks", self.double),
            ("single_blocks", "single_transformer_blocks", self.single),
        )

    def sources(self, path: str) -> tuple[str, ...]:
        """Return diffusers' paths of the layers that make up one of ours; raises KeyError for other paths."""
        for ours, theirs, layers in self.stacks:
            if path.startswith(f"{ours}."):
                _, number, layer = path.split(".", 2)
                return tuple(f"{theirs}.{number}.{name}" for name in layers[layer])
        return (self.top[path],)

    def source_keys(self, key: str) -> tuple[str, ...]:
        """Return diffusers' names of the weights that make up one of ours."""
        path, _, leaf = key.rpartition(".")
        return leaf_names(self.sources(path), leaf)

    def our_keys(self, names: Iterable[str]) -> Iterator[str]:
        """Yield our names of the weights of a model in diffusers' layout."""
        has = set(names)
        keys = [f"{path}.{ending}" for path in self.top for ending in ENDINGS]
        for ours, theirs, layers in self.stacks:
            for number in sorted({int(name.split(".")[1]) for name in has if name.startswith(f"{theirs}.")}):
                for layer in layers:
                    endings = ("scale",) if layer.endswith("_norm") else ENDINGS
                    keys += [f"{ours}.{number}.{layer}.{ending}" for ending in endings]
        yield from (key for key in keys if any(source in has for source in self.source_keys(key)))

    def from_diffusers(self, weights: Weights) -> Weights:
        """Rename a model in diffusers' layout to our names, joining each tensor when it is read.

        Raises UserError naming missing parts of an incomplete layer.
        """
        return joined(weights, {key: self.source_keys(key) for key in self.our_keys(weights.shapes)}, f"{SWAPPED}.")

    def is_linear(self, path: str) -> bool:
        """Return True for the path of a Linear layer in the layout of the original checkpoint."""
        for ours, _, layers in self.stacks:
            if path.startswith(f"{ours}."):
                layer = path.split(".", 2)[-1]
                return layer in layers and not layer.endswith("_norm")
        return path in self.top

    def linear_paths(self, num_blocks: Mapping[str, int]) -> Iterator[str]:
        """Yield the path of every Linear layer in the order of the checkpoint, for these numbers of blocks by list."""
        yield from self.top
        for ours, _, layers in self.stacks:
            paths = (f"{ours}.{number}.{layer}" for number in range(num_blocks[ours]) for layer in layers)
            yield from filter(self.is_linear, paths)


def leaf_names(paths: Iterable[str], leaf: str) -> tuple[str, ...]:
    """Return diffusers' names of one kind of weight of some layers; what we call a norm's scale is its weight."""
    return tuple(f"{path}.{'weight' if leaf == 'scale' else leaf}" for path in paths)
