"""Separate changes of parts of a layer's rows, for files of programs that split the layer into several.

LoRA factors of the parts can be joined into one LoRA of the whole layer. LoKr, LoHa, rotations and DoRA cannot, so each
part keeps its own change. `rows_1_2_of_3.lokr_w1` names a tensor of the second third of the rows. These names are used
in memory and in training states only; files keep their own (networks/core/files/file_spelling.py).
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from networks.core.changes.change import Change, ChangeSize, Forward, Misfit, ModuleTensors

ROWS_KEY = re.compile(r"(rows_(\d+)_(\d+)_of_(\d+))\.(.+)")
IN_NAME = re.compile(r"(.+)\.(rows_\d+_\d+_of_\d+)")


def rows_name(first: int, stop: int, total: int) -> str:
    """Return the name of the rows from `first` to `stop`, in units of 1 / `total` of the layer's rows."""
    return f"rows_{first}_{stop}_of_{total}"


def is_in_rows(tensors: Collection[str]) -> bool:
    return any(ROWS_KEY.fullmatch(key) for key in tensors)


def group_by_rows(tensors: ModuleTensors) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each part by the name of its rows."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = ROWS_KEY.fullmatch(key)
        if match is not None:
            groups.setdefault(match[1], {})[match[5]] = tensor
    return groups


def split_piece_key(module: str, key: str) -> tuple[str, str]:
    """Move the rows in a module's name to its parameter key. Other names are returned unchanged."""
    match = IN_NAME.fullmatch(module)
    return (module, key) if match is None else (match[1], f"{match[2]}.{key}")


def rows_of(name: str, num_rows: int) -> slice:
    """Return the rows of a part in a layer with `num_rows` rows. Raises `Misfit` if they cannot be divided so."""
    match = ROWS_KEY.fullmatch(f"{name}.weight")
    assert match is not None
    first, stop, total = (int(number) for number in match.groups()[1:4])
    unit, remainder = divmod(num_rows, total)
    if remainder:
        raise Misfit("", (total,), (num_rows,))
    return slice(first * unit, stop * unit)


class LinearRows(nn.Linear):
    """View of some rows of a Linear layer, which a change can use as a layer. It has no tensors itself."""

    def __init__(self, whole: nn.Linear, rows: slice) -> None:
        nn.Module.__init__(self)
        # nn.Module would register the layer as a child, but it belongs to the base model.
        object.__setattr__(self, "whole", whole)
        self.rows, self.in_features, self.out_features = rows, whole.in_features, rows.stop - rows.start

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name not in ("weight", "bias"):
            return super().__getattr__(name)
        parameter = getattr(self.whole, name)
        return cast(Tensor, None) if parameter is None else parameter[self.rows]


class InRows(nn.Module):
    """A change composed of changes of separate rows. Other rows stay unchanged.

    The layer runs once for all changes that keep its input, and once more for each change that does not.
    """

    changed_parameters = ("weight",)
    size = ChangeSize()

    def __init__(self, changes: Mapping[str, Change]) -> None:
        super().__init__()
        for name, change in changes.items():
            assert isinstance(change, nn.Module)
            self.add_module(name, change)

    @property
    def fast_keys(self) -> frozenset[str]:
        return frozenset(f"{name}.{key}" for name, change in self.changes.items() for key in change.fast_keys)

    @property
    def changes(self) -> dict[str, Change]:
        return dict(self.named_children())  # type: ignore[arg-type]

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        out = base(x)
        parts, end = [], 0
        # The changes are in the order of the file, and the outputs are concatenated in the order of the rows.
        for name, change in sorted(self.changes.items(), key=lambda piece: rows_of(piece[0], out.shape[-1]).start):
            rows = rows_of(name, out.shape[-1])

            def base_rows(z: Tensor, rows: slice = rows) -> Tensor:
                # A change that leaves the layer's input alone gets the output that all of them share.
                return (out if z is x else base(z))[..., rows]

            parts += [out[..., end : rows.start]] if end < rows.start else []
            parts.append(change.forward(x, base_rows, strength))
            end = rows.stop
        return torch.cat([*parts, out[..., end:]], -1) if end < out.shape[-1] else torch.cat(parts, -1)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        result: Tensor | None = None
        for name, change in self.changes.items():
            rows = rows_of(name, len(base))
            part = change.merged(base[rows], strength)
            result = base.to(part.dtype, copy=True) if result is None else result
            result[rows] = part
        assert result is not None
        return result

    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(
            torch.stack([change.norm().double() for change in self.changes.values()])
        )
        return norm

    def scale_(self, ratio: Tensor) -> None:
        for change in self.changes.values():
            change.scale_(ratio)

    def stored_tensors(self) -> Mapping[str, Tensor]:
        pieces = self.changes.items()
        return {f"{name}.{key}": tensor for name, change in pieces for key, tensor in change.stored_tensors().items()}

    def load(self, tensors: ModuleTensors) -> None:
        changes = self.changes
        for name, group in group_by_rows(tensors).items():
            changes[name].load(group)


def changes_in(change: Change) -> Iterator[Change]:
    """Yield the changes that a change consists of: those of its rows, or itself."""
    yield from change.changes.values() if isinstance(change, InRows) else (change,)
