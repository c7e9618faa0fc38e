"""Nested arguments and outputs of models: dicts, lists and tuples with tensors as leaves, addressed by paths.

torch's pytree cannot hold the outputs of models: it needs their classes, some of which only a loaded model can build.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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

    def __reduce__(self) -> Any:
        return Output, (dict(self),)  # what torch.load takes with weights_only


class Noted(Tensor):
    """A tensor that calls `note` when it is read; results of operations are plain tensors."""

    note: Callable[[], Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def read(_: Path, leaf: Any) -> Any:
            if not isinstance(leaf, Noted):
                return leaf
            leaf.note()
            return leaf.as_subclass(Tensor)

        with torch._C.DisableTorchFunctionSubclass():
            return func(*map_leaves(tuple(args), read), **map_leaves(kwargs or {}, read))


def noted(tensor: Tensor, note: Callable[[], Any]) -> Noted:
    made = tensor.as_subclass(Noted)
    made.note = note
    return made


def map_leaves(tree: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Return a tree of plain dicts, `Output`s, lists and tuples with every leaf replaced by `change(path, leaf)`."""
    if isinstance(tree, Mapping):
        kind = dict if type(tree) is dict else Output
        return kind({key: map_leaves(tree[key], change, (*path, key)) for key in tree})
    if isinstance(tree, list | tuple):
        items = [map_leaves(item, change, (*path, index)) for index, item in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return change(path, tree)


def leaves(tree: Any) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    map_leaves(tree, found.setdefault)
    return found


def replace_leaves(tree: Any, new: Mapping[Path, Any]) -> Any:
    """Return a copy with the leaves at the paths of `new` replaced."""
    return map_leaves(tree, lambda path, leaf: new.get(path, leaf))


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return map_leaves(tree, lambda _, leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def copy_tensors(tree: Any) -> Any:
    """Return a copy with copied tensors, because pipelines change theirs in place."""
    return map_tensors(tree, lambda tensor: tensor.detach().clone())


def move(tree: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move the tensors to a device; with `dtype` floating point ones are also converted."""
    return map_tensors(tree, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))


def is_same(a: Any, b: Any) -> bool:
    """Return True for two leaves of equal type, shape and values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return type(a) is type(b) and not isinstance(a, Tensor) and (a is b or bool(a == b))


def differing(a: Mapping[Path, Any], b: Mapping[Path, Any]) -> set[Path]:
    """Return the paths whose leaves differ, or that only one of the two has."""
    return {path for path in a.keys() | b.keys() if path not in a or path not in b or not is_same(a[path], b[path])}


def float_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree).values() if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def join_values(output: Any) -> Tensor:
    """Return all values of an output as one vector."""
    return torch.cat([tensor.flatten() for tensor in float_tensors(output)])


def fill_like(output: Any, values: Tensor) -> Any:
    """Return an output of the same structure that holds the vector `values`."""
    parts = iter(torch.split(values, [tensor.numel() for tensor in float_tensors(output)]))
    return map_tensors(output, lambda old: next(parts).reshape(old.shape).to(old) if old.is_floating_point() else old)


class Unequal(ValueError):
    """Arguments of several samples that cannot share a call."""


def join_rows(rows: Sequence[Any], example: Any, pads: bool) -> Any:
    """Return the arguments of one call for several samples: lists of one item are joined, and tensors along the first
    axis, if that is 1 in `example`, or a new one. With `pads` shorter tensors get zeros at their ends. Raises Unequal.

    In `rows` themselves the first axis may count the tokens of a caption.
    """
    first = rows[0]
    if isinstance(first, Mapping) and all(row.keys() == first.keys() for row in rows):
        return {key: join_rows([row[key] for row in rows], example[key], pads) for key in first}
    if isinstance(first, list) and all(len(row) == 1 for row in rows):
        return [item for row in rows for item in row]
    if isinstance(first, list | tuple) and all(len(row) == len(first) for row in rows):
        columns = zip(zip(*rows, strict=True), example, strict=True)
        return type(first)(join_rows(items, shown, pads) for items, shown in columns)
    shown = first if example is None else example
    if all(isinstance(row, Tensor) for row in rows) and shown.shape[:1] in ((), (1,)):
        return join_tensors(rows, pads)
    if all(is_same(row, first) for row in rows):
        return first
    raise Unequal


def join_tensors(rows: Sequence[Tensor], pads: bool) -> Tensor:
    """Join tensors along the first axis; with `pads` shorter ones get zeros at their ends. Raises Unequal."""
    values = [row.reshape(1) if row.ndim == 0 else row for row in rows]
    if len({value.ndim if pads else value.shape for value in values}) != 1:
        raise Unequal
    sides = [max(sides) for sides in zip(*(value.shape for value in values), strict=True)]
    return torch.cat([pad_to(value, sides) for value in values])


def take_row(output: Any, row: int, count: int) -> Any:
    """Return the output for one of `count` samples."""
    if isinstance(output, Tensor) or (isinstance(output, list) and len(output) == count):
        return output[row : row + 1]
    return tuple(take_row(value, row, count) for value in output)


def split_rows(output: Any, count: int) -> list[Tensor]:
    """Return the values of each sample of an output as a vector."""
    return [join_values(take_row(output, row, count)) for row in range(count)]


def pad_to(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor with zeros added at the end of each axis."""
    more = [(0, side - have) for side, have in zip(shape, value.shape, strict=True)]
    return pad(value, [count for pair in reversed(more) for count in pair])


def format_path(path: Path) -> str:
    return ".".join(map(str, path))


def list_paths(paths: Sequence[Path]) -> str:
    return ", ".join(map(format_path, paths)) or "none"
