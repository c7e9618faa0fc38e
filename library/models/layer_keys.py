"""Names of a denoiser's layers and weights in the original layout, which is ours, and in diffusers' layout.

One of our layers may stack several of diffusers' along its rows, or one of diffusers' several of ours.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.checkpoints.adapter_names import ModuleNames, Piece
from library.checkpoints.fused_tensors import join_tensors, split_rows
from library.checkpoints.weights import Weights

KOHYA_PREFIX = "lora_unet_"  # prefix of a denoiser's layers in kohya's naming
GENERIC_PREFIX = "diffusion_model."

Layers = Mapping[str, tuple[str, ...]]
"""Our paths of layers -> diffusers' paths of the layers that each one stacks."""


def is_norm(path: str) -> bool:
    """Return True if a path ends in the name of a norm."""
    return "norm" in path.rpartition(".")[2]


def list_leaves(path: str) -> Mapping[str, str]:
    """Return the names of a layer's weights, which are the same in both layouts."""
    return {"weight": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Stack:
    """A list of blocks: its name in our layout and in diffusers', and the layers of one block."""

    ours: str
    theirs: str
    layers: Layers


@dataclass(frozen=True)
class LayerKeys:
    """The layers of one base model's denoiser."""

    top: Mapping[str, str]  # layers outside of blocks
    stacks: tuple[Stack, ...]
    swapped: str | None = None  # a layer whose shift and scale diffusers stores in reverse order
    leaves: Callable[[str], Mapping[str, str]] = list_leaves  # path -> our names of its weights -> diffusers'
    is_other: Callable[[str], bool] = is_norm  # True for the path of a layer that is not Linear
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Layers that diffusers joins: the end of its path, and the ends that stand in `stacks` for equal shares of its
    rows, as in `BaseNames.joined`."""
    parameters: tuple[str, ...] = ()  # of the model itself, with the same name in both layouts
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Relative numbers of rows of the layers that one of ours stacks, by the end of its path; equal for others."""
    prefix: str = "transformer."  # of diffusers' paths in adapter files
    others: tuple[str, ...] = ()  # prefixes of the same paths in some trainers' files, as for `name_layer`

    def split(self, path: str) -> tuple[Stack, str, str] | None:
        """Split a path into its stack, its block number and the path inside the block; None outside of blocks."""
        for stack in self.stacks:
            if path.startswith(f"{stack.ours}."):
                number, _, layer = path.removeprefix(f"{stack.ours}.").partition(".")
                return stack, number, layer
        return None

    def sources(self, path: str) -> tuple[str, ...]:
        """Return diffusers' paths of the layers that one of ours stacks. Raises KeyError for other paths."""
        if (parts := self.split(path)) is None:
            return (self.top[path],)
        stack, number, layer = parts
        return tuple(f"{stack.theirs}.{number}.{name}".rstrip(".") for name in stack.layers[layer])

    def source_keys(self, key: str) -> tuple[str, ...]:
        """Return diffusers' names of the weights that one of ours stacks."""
        if key in self.parameters:
            return (key,)
        path, _, leaf = key.rpartition(".")
        return tuple(f"{source}.{self.leaves(path)[leaf]}" for source in self.sources(path))

    def our_keys(self, names: Iterable[str]) -> Iterator[str]:
        """Yield our names of the weights of a model in diffusers' layout."""
        present = set(names)
        paths = list(self.top)
        for stack in self.stacks:
            block_names = [
                name.removeprefix(f"{stack.theirs}.") for name in present if name.startswith(f"{stack.theirs}.")
            ]
            numbers = sorted({int(name.partition(".")[0]) for name in block_names})
            # A block that is itself a layer has an empty name in its stack.
            paths += [f"{stack.ours}.{number}.{layer}".rstrip(".") for number in numbers for layer in stack.layers]
        keys = (f"{path}.{leaf}" for path in paths for leaf in self.leaves(path))
        yield from (key for key in keys if not present.isdisjoint(self.source_keys(key)))

    def from_diffusers(self, weights: Weights) -> Weights:
        """Rename a model in diffusers' layout to our names; stacked tensors are joined when they are read.

        Raises UserError naming the missing parts of an incomplete layer.
        """
        for whole, ends in self.joined:
            weights = split_rows(weights, whole, ends)
        parts = {key: self.source_keys(key) for key in self.our_keys(weights.shapes)}
        return join_tensors(weights, parts, self.swapped and f"{self.swapped}.")

    def is_linear(self, path: str) -> bool:
        """Return True for the path of a Linear layer in our layout."""
        parts = self.split(path)
        return (path in self.top if parts is None else parts[2] in parts[0].layers) and not self.is_other(path)

    def linear_paths(self, num_blocks: Mapping[str, int]) -> Iterator[str]:
        """Yield the path of every Linear layer; `num_blocks` is the number of blocks of each stack."""
        yield from filter(self.is_linear, self.top)
        for stack in self.stacks:
            blocks = range(num_blocks.get(stack.ours, 0))
            yield from filter(self.is_linear, (f"{stack.ours}.{n}.{layer}" for n in blocks for layer in stack.layers))

    def name(self, path: str) -> ModuleNames:
        """Return the names of a layer in adapter files. Raises KeyError for other paths."""
        shares = next((shares for end, shares in self.shares.items() if path.endswith(f".{end}")), ())
        sources, swaps_pair = self.sources(path), path == self.swapped
        return name_layer(path, sources, shares=shares, prefix=self.prefix, others=self.others, swaps_pair=swaps_pair)

    def list_names(self, num_blocks: Mapping[str, int]) -> Iterator[ModuleNames]:
        """Yield the names of every Linear layer, as `linear_paths`."""
        yield from map(self.name, self.linear_paths(num_blocks))

    @property
    def of_file(self) -> dict[str, Any]:
        """The fields of `TransformerFile` that follow from the names of the layers."""
        return {"is_layer": self.is_linear, "name": self.name, "from_diffusers": self.from_diffusers}


def name_layer(
    path: str,
    sources: Sequence[str],
    *,
    shares: Sequence[int] = (),
    prefix: str = "transformer.",
    others: Sequence[str] = (),
    aliases: tuple[str, ...] = (),
    swaps_pair: bool = False,
) -> ModuleNames:
    """Name a layer in adapter files from its path in the original checkpoint and from `sources`, its paths in
    diffusers.

    `shares` are the relative numbers of rows of several sources, equal by default. Files have diffusers' paths below
    `prefix`, and some trainers' files below `others`, where kohya's prefix takes underscored paths.
    """

    def below_others(source: str) -> tuple[str, ...]:
        return tuple(underscore(source) if other == KOHYA_PREFIX else f"{other}{source}" for other in others)

    pieces = tuple(
        Piece(f"{prefix}{source}", share, below_others(source))
        for source, share in zip(sources, shares or [1] * len(sources), strict=False)
    )
    is_whole = len(sources) == 1
    return ModuleNames(
        kohya=underscore(path),
        generic=f"{GENERIC_PREFIX}{path}",
        diffusers=pieces[0].diffusers if is_whole else pieces,
        aliases=(*aliases, *pieces[0].aliases) if is_whole else aliases,
        swaps_pair=swaps_pair,
    )


def underscore(path: str) -> str:
    """Return kohya's name of a denoiser's layer."""
    return KOHYA_PREFIX + path.replace(".", "_")
