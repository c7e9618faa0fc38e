"""Serialisation of nested values with tensors, such as an optimizer's state, to plain JSON and a dictionary of tensors.

Nothing is pickled, so reading executes no code, and every number is restored bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from library.base.errors import UserError

TENSOR, LIST, TUPLE, TABLE = "tensor", "list", "tuple", "table"


def dump_tree(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Convert `value` to JSON; its tensors are added to `tensors`, under names that begin with `name`.

    Supports None, bool, int, float, str, tensors, numpy scalars, lists, tuples, and dictionaries with int or str keys.
    Raises UserError naming anything else.
    """
    # np.float64 is a subclass of float, but the exact types below exclude it.
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        # Cloned, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        if unsupported := [key for key in value if type(key) not in (int, str)]:
            raise UserError(f"{name} has the key {unsupported[0]!r}, which cannot be written")
        # Pairs, because the keys of a JSON object are strings and the parameters of an optimizer's state are numbered.
        return {TABLE: [[key, dump_tree(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [dump_tree(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {LIST if type(value) is list else TUPLE: items}
    raise UserError(f"{name} is a {type(value).__name__}, which cannot be written without pickle")


def load_tree(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Restore a value from the result of `dump_tree`. Raises UserError for anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == TENSOR and content in tensors:
            return tensors[content]
        if kind == TABLE:
            return {key: load_tree(item, tensors) for key, item in content}
        if kind in (LIST, TUPLE):
            items = [load_tree(item, tensors) for item in content]
            return items if kind == LIST else tuple(items)
    raise UserError(f"{value!r} is not part of a nested value")
