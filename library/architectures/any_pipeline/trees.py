"""Nested arguments and outputs of models: dicts, lists and tuples with tensors as leaves, addressed by paths."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Path = tuple[str | int, ...]
"""The keys and indices that lead to a leaf."""


class Output(dict[str, Any]):
    """A model's output with named fields, which are also attributes and, in order, items of a tuple."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


def flatten(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, leaf) in order."""
    if isinstance(tree, Mapping):
        for key in tree:
            yield from flatten(tree[key], (*path, key))
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from flatten(item, (*path, index))
    else:
        yield path, tree


def leaves(tree: Any) -> dict[Path, Any]:
    return dict(flatten(tree))


def map_leaves(tree: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Return a tree of plain dicts, `Output`s, lists and tuples with every leaf replaced by `change(path, leaf)`."""
    if isinstance(tree, Mapping):
        # Outputs of transformers and diffusers are dicts whose fields are attributes too.
        kind = dict if type(tree) is dict else Output
        return kind({key: map_leaves(tree[key], change, (*path, key)) for key in tree})
    if isinstance(tree, list | tuple):
        items = [map_leaves(item, change, (*path, index)) for index, item in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return change(path, tree)


def replace_leaves(tree: Any, new: Mapping[Path, Any]) -> Any:
    """Return a copy with the leaves at the paths of `new` replaced."""
    return map_leaves(tree, lambda path, leaf: new.get(path, leaf))


def copy_tensors(tree: Any) -> Any:
    """Return a copy with copied tensors, because pipelines change theirs in place."""
    return map_leaves(tree, lambda _, leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)


def move(tree: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move the tensors to a device; with `dtype` floating point ones are also converted."""

    def change(_: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return map_leaves(tree, change)


def is_same(a: Any, b: Any) -> bool:
    """Return True for two leaves of equal type, shape and values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and (a is b or bool(a == b))


def differing(a: Mapping[Path, Any], b: Mapping[Path, Any]) -> set[Path]:
    """Return the paths whose leaves differ, or that only one of the two has."""
    return {path for path in a.keys() | b.keys() if path not in a or path not in b or not is_same(a[path], b[path])}


def float_tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in flatten(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def count_values(output: Any) -> int:
    return sum(tensor.numel() for tensor in float_tensors(output))


def join_values(output: Any) -> Tensor:
    """Return all values of an output as one vector."""
    return torch.cat([tensor.flatten() for tensor in float_tensors(output)])


def fill_like(output: Any, values: Tensor) -> Any:
    """Return an output of the same structure that holds the vector `values`."""
    start = 0

    def change(_: Path, leaf: Any) -> Any:
        nonlocal start
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        start += leaf.numel()
        return values[start - leaf.numel() : start].reshape(leaf.shape).to(leaf)

    return map_leaves(output, change)


def stack_rows(rows: Sequence[Any]) -> Any:
    """Return the arguments of one call for several samples: tensors whose first axis is 1 are joined along it."""
    columns = [leaves(row) for row in rows]

    def stack(path: Path, leaf: Any) -> Any:
        is_row = isinstance(leaf, Tensor) and leaf.shape[:1] == (1,)
        return torch.cat([column[path] for column in columns]) if is_row else leaf

    return map_leaves(rows[0], stack)


def split_rows(output: Any, count: int) -> list[Tensor]:
    """Return the values of each sample of an output as a vector."""
    return [torch.cat([tensor[row].flatten() for tensor in float_tensors(output)]) for row in range(count)]


def have_equal_shapes(rows: Sequence[Mapping[Path, Any]]) -> bool:
    """Return True if samples differ in values of tensors only."""
    shapes = [{p: v.shape if isinstance(v, Tensor) else v for p, v in row.items()} for row in rows]
    return all(other == shapes[0] for other in shapes)


def empty_like(output: Any) -> Any:
    """Return an output of the same structure and shapes, zeros in float32 on the CPU."""
    return map_leaves(output, lambda _, leaf: torch.zeros(leaf.shape) if isinstance(leaf, Tensor) else leaf)


def format_path(path: Path) -> str:
    return ".".join(map(str, path))
