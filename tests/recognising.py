"""Which base model an adapter file is for, by the cards of all of them."""

from collections.abc import Mapping, Sequence

from library.architectures.cards import list_cards
from library.checkpoints.recognition import recognise_adapter


def base_of(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name on the card of the base model that is recognised by the keys of a file."""
    card = recognise_adapter(list_cards(), shapes, {})
    return card.name if card else None
