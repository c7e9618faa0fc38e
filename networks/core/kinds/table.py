"""Which kind of adapter a module in a file is, by its leaves: the table that the trainer and all tools look into."""

from collections.abc import Collection

from torch import nn

from library.checkpoints.adapter_names import FileNaming
from library.errors import UserError
from networks.core.changes.change import Change, Leaves
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.kinds import full, glora, ia3, loha, lokr, lora, norm, qkv_pieces, tucker
from networks.core.kinds.kind import Kind
from networks.core.kinds.rotations import boft, oft, oft_v2

OTHER = Kind(name="other", words="another kind of adapter", needs=())
# The first that is complete decides.
KINDS: tuple[Kind, ...] = (
    tucker.KIND,
    lora.KIND,
    norm.KIND,
    loha.KIND,
    *lokr.KINDS,
    oft_v2.KIND,
    boft.KIND,
    *oft.KINDS,
    full.KIND,
    glora.KIND,
    ia3.KIND,
)
SHARED = frozenset((ALPHA, DORA_SCALE))


def kind_of(leaves: Collection[str]) -> Kind:
    """The kind that a module with these leaves is; of incomplete modules the one that they belong to."""
    there = frozenset(leaves)
    if qkv_pieces.is_in_rows(there):
        return PIECES
    complete = (kind for kind in KINDS if kind.needs and there.issuperset(kind.needs))
    begun = (kind for kind in reversed(KINDS) if there & (kind.leaves - SHARED))
    return next(complete, next(begun, OTHER))


def change_of(leaves: Leaves, layer: nn.Module | None = None) -> Change:
    """The change that a module in a file makes, of `layer` or, without one, of a weight alone.

    Raises UserError for a kind that is only recognised.
    """
    kind = kind_of(leaves)
    if kind.read is None:
        raise UserError(f"{kind.words} is not computed here")
    return kind.read(leaves, layer)


PIECES = qkv_pieces.kind_with(change_of)
"""Several modules of a file in one layer of the base model. It is no row of the table: no file has it."""


def held_leaves(naming: FileNaming) -> frozenset[str] | None:
    """The leaves that programs of a naming read; None for all, those of no kind included."""
    if naming == "kohya":
        return None
    held = {leaf for kind in KINDS if naming in kind.namings for leaf in kind.leaves}
    return frozenset(held - {DORA_SCALE} if naming == "diffusers" else held)
