"""Look-up of adapter kinds and of the layout of a module in a file, from the files in networks/core/kinds.

A new kind is one more file in that folder; there is no list of kinds to extend.
"""

import importlib
import pkgutil
from collections.abc import Collection
from functools import cache
from pathlib import Path

from torch import nn

from library.base.errors import UserError
from library.checkpoints.adapter_names import FileNaming
from networks.core.changes import qkv_pieces
from networks.core.changes.change import Change, ModuleTensors
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

FOLDER = Path(__file__).parents[1] / "kinds"
PACKAGE = "networks.core.kinds"
OTHER = KeyLayout(name="other", words="another kind of adapter", needs=())
SHARED = frozenset((ALPHA, DORA_SCALE))


@cache
def list_kinds() -> tuple[AdapterKind, ...]:
    """Return every kind, sorted by file name."""
    # Sorted, so that messages and the order of layouts do not depend on the file system.
    names = sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]))
    return tuple(importlib.import_module(f"{PACKAGE}.{name}").KIND for name in names)


@cache
def list_layouts() -> tuple[KeyLayout, ...]:
    """Return every layout once, those with most required keys first: LoRA with a core has all keys that LoRA needs."""
    unique = dict.fromkeys(layout for kind in list_kinds() for layout in (*kind.layouts, *kind.merged_layouts))
    return tuple(sorted(unique, key=lambda layout: -len(layout.needs)))


def recognise_layout(tensors: Collection[str]) -> KeyLayout:
    """Return the layout of a module with these parameter keys. For an incomplete module it is one that shares a key."""
    keys = frozenset(tensors)
    if qkv_pieces.is_in_rows(keys):
        return PIECES
    complete = (layout for layout in list_layouts() if keys.issuperset(layout.needs))
    # An incomplete module counts as the simplest layout that has one of its keys, which need the fewest others.
    partial = (layout for layout in reversed(list_layouts()) if keys & (layout.keys - SHARED))
    return next(complete, next(partial, OTHER))


def make_change(tensors: ModuleTensors, layer: nn.Module | None = None) -> Change:
    """Make the change of a module in a file, for `layer` or, without one, for merging only.

    Raises UserError for a layout that is only recognised.
    """
    layout = recognise_layout(tensors)
    if layout.read is None:
        raise UserError(f"{layout.words} is not computed here")
    return layout.read(tensors, layer)


def read_pieces(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    """Make the change, for merging, of a layer with changes of separate rows."""
    return qkv_pieces.InRows(
        {name: make_change(group) for name, group in qkv_pieces.group_by_rows(tensors).items()}
    ).requires_grad_(False)


PIECES = KeyLayout(
    name="pieces", words="several changes of one layer", needs=(), read=read_pieces, may_have=(),
    rank_of=lambda tensors: 1,
)  # fmt: skip
"""Several modules of a file that are one layer of the base model. No kind lists it and no file has it."""


def list_held_keys(naming: FileNaming) -> frozenset[str] | None:
    """Return the parameter keys that programs of a naming read; None for all keys, including unrecognised ones."""
    if naming == "kohya":
        return None
    held = {key for layout in list_layouts() if naming in layout.namings for key in layout.keys}
    # diffusers does not read magnitudes per input. Those per output, which it reads, are added by the caller.
    return frozenset(held - {DORA_SCALE} if naming == "diffusers" else held)
