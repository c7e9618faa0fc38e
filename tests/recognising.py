"""Recognition of an adapter file's base model by the specs of all base models."""

from collections.abc import Mapping, Sequence

from library.architectures.specs import list_specs
from library.checkpoints.recognition import recognise_adapter


def base_of(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return the name of the base model that is recognised by a file's keys."""
    spec = recognise_adapter(list_specs(), shapes, {})
    return spec.name if spec else None
