"""Weights into modules.

A module is built without memory (on the meta device) and takes its weights straight in the training dtype, so nothing
is initialised twice and the peak is about the weights themselves.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.checkpoints.quantised import times, turn_regularly
from library.checkpoints.weights import FromFiles, Weights
from library.errors import NotThere, UserError, few
from library.memory.codecs.codec import AS_IN_FILE, AsInFile, AsRead, Codec, RequestedFormat
from library.memory.codecs.plain import Plain
from library.memory.codecs.scaled import Scaled
from library.memory.codecs.weight_format import load_format
from library.memory.devices import channels_last_where_it_fits
from library.memory.frozen import keep_in, layers_in_blocks, store_in
from library.models.shapes import shape_of

logger = logging.getLogger(__name__)

BYTES_IN_CACHE = 1 << 19


@dataclass(frozen=True)
class Component:
    """One model that is not loaded yet: its configuration, and weights under its module paths."""

    config: Mapping[str, Any]
    weights: Weights


@dataclass(frozen=True)
class Absent:
    """In place of the `Component` of a model whose files are not there: who needs it after all hears why."""

    reason: str

    @property
    def config(self) -> Mapping[str, Any]:
        raise NotThere(self.reason)

    @property
    def weights(self) -> Weights:
        raise NotThere(self.reason)


MaybeComponent = Component | Absent
ComponentT = TypeVar("ComponentT")
ConfigT = TypeVar("ConfigT")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def open_if_there(may_be_absent: bool, open_it: Callable[[], ComponentT]) -> ComponentT | Absent:
    """What is opened, or, where a run may do without it, the reason why its files cannot be."""
    try:
        return open_it()
    except NotThere as error:
        if not may_be_absent:
            raise
        return Absent(str(error))


def on_meta_device(model: Callable[[ConfigT], ModuleT], config: ConfigT) -> ModuleT:
    """A model with shapes alone, for `materialise`."""
    with torch.device("meta"):
        return model(config)


def first_side(component: Component | Absent, name: str) -> int | None:
    """The first side of a weight, which for embeddings is the number of words; None where the files are not there."""
    return None if isinstance(component, Absent) else shape_of(component.weights.shapes, name)[0]


def check_text_width(flag: str, component: MaybeComponent, embedding: str, width: int, whose: str) -> None:
    """Raise UserError where an encoder that is there gives another `width` than the transformer takes.

    `embedding` is the name of its word embedding, `whose` says in the message which encoder it should be.
    """
    if isinstance(component, Component) and (found := shape_of(component.weights.shapes, embedding)[1]) != width:
        raise UserError(
            f"{flag} {component.weights.origin} is {found} wide, the transformer listens to {width}; it is another "
            f"encoder than {whose}"
        )


def materialise(
    model: nn.Module, weights: Weights, dtype: torch.dtype, weight_format: RequestedFormat | None = None
) -> nn.Module:
    """Give a module on the meta device its weights in `dtype`; frozen, in evaluation mode.

    With a `weight_format` the weights inside its blocks are stored in it, each as soon as it is read: the most memory
    that this takes is the result and one weight. With AS_IN_FILE those that the file has in 8 bits stay as they are,
    and so do those that it has in the format that is asked for, unless they are changed. Where layers are taken away
    all of them are stored in some format.

    Raises UserError naming missing weights and wrong shapes; names that the model does not know are warned of.
    """
    wanted = model.state_dict()
    check_names(weights, wanted, type(model).__name__)
    check_shapes(weights, wanted, type(model).__name__)
    layout = channels_last_where_it_fits(wanted.values())
    asked = weight_format if isinstance(weight_format, AsRead) else AsRead(weight_format)
    reader = WeightReader(weights, wanted, dtype, layout, asked.changes)
    stored = store_blocks(model, reader, asked)
    read = {name: reader.read(name) for name in wanted if name not in stored}
    model.load_state_dict(read, assign=True, strict=not stored)
    return model.requires_grad_(False).eval()


def check_names(weights: Weights, wanted: Mapping[str, Tensor], model: str) -> None:
    """Raise UserError for missing weights; warn of names that the model does not know."""
    missing = [name for name in wanted if name not in weights.shapes]
    if missing:
        raise UserError(
            f"{weights.origin} is incomplete: {len(missing)} of the {len(wanted)} weights of {model} are missing: "
            f"{few(missing)}"
        )
    unknown = [name for name in weights.shapes if name not in wanted and not name.endswith("position_ids")]
    if unknown:
        logger.warning(
            "%s has %d weights that %s does not know, they are not used: %s",
            weights.origin, len(unknown), model, few(unknown),
        )  # fmt: skip


def check_shapes(weights: Weights, wanted: Mapping[str, Tensor], model: str) -> None:
    """Raise UserError for weights of another shape than the model has."""
    wrong = [name for name, tensor in wanted.items() if not fits(weights, name, tuple(tensor.shape))]
    if wrong:
        has, needs = weights.shapes[wrong[0]], tuple(wanted[wrong[0]].shape)
        raise UserError(
            f"{weights.origin}: {len(wrong)} weights do not fit {model}, the first is {wrong[0]}: it has the shape "
            f"{has}, the model needs {needs}"
        )


@dataclass(frozen=True)
class WeightReader:
    """Reads the weights of one model as the model is to have them."""

    weights: Weights
    wanted: Mapping[str, Tensor]
    dtype: torch.dtype
    layout: torch.memory_format
    changes: Mapping[str, Callable[[Tensor], Tensor]]  # by name, see `AsRead`

    def read(self, name: str) -> Tensor:
        value = read_as(self.weights, name, self.wanted[name], self.dtype, self.layout)
        change = self.changes.get(name)
        return value if change is None else change(value)

    def keep_quantised(self, name: str, layer: nn.Module, codec: Codec | AsInFile | None) -> bool:
        """Give a layer its weight as the file stores it. Return False where that is not in `codec`, or is changed."""
        quantised = None if name in self.changes else self.weights.quantised.get(name)
        if quantised is None or codec not in (AS_IN_FILE, load_format(quantised.kind).codec):
            return False
        parts = quantised.read()
        if parts is None:
            return False
        turn = partial(turn_regularly, group_size=quantised.group_size) if quantised.group_size else None
        keep_in(Scaled(times, turn), layer, parts, self.wanted[name].shape, self.dtype)
        return True


def store_blocks(model: nn.Module, reader: WeightReader, asked: AsRead) -> set[str]:
    """Store the weights inside the model's blocks in the requested format; return their names."""
    if asked.codec is None and asked.take is None:
        return set()
    codec = None if isinstance(asked.codec, AsInFile) else asked.codec
    if codec is None and asked.take is not None:
        codec = Plain()
    stored = set()
    for path, layer in layers_in_blocks(model).items():
        name = f"{path}.weight"
        if not reader.keep_quantised(name, layer, asked.codec):
            if codec is None:
                continue
            store_in(codec, layer, reader.read(name))
        stored.add(name)
        if asked.take is not None:
            asked.take(layer)
    return stored


def cast(value: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """What `value.to(dtype, memory_format=layout)` gives, bit for bit, in a faster way where that one is slow.

    In general one pass does number format and layout: each pass more over a U-Net costs as long as reading it. But
    torch turns float16 into bfloat16 one number at a time. By way of float32, which is exact, it takes a quarter of
    the time (half of it where the layout changes too), as long as the parts stay in the processor's cache.
    """
    is_slow = (value.dtype, dtype, value.device.type) == (torch.float16, torch.bfloat16, "cpu")
    if not is_slow or value.ndim == 0 or value.numel() == 0:
        return value.to(dtype, memory_format=layout)
    num_rows = max(1, BYTES_IN_CACHE * len(value) // value.nbytes)
    return joined(torch.split(value, num_rows), torch.empty_like(value, dtype=dtype, memory_format=layout))


def joined(pieces: Iterable[Tensor], found: Tensor) -> Tensor:
    """`found`, which gets the rows of all pieces in its own number format and layout."""
    first = 0
    for rows in pieces:
        target = found[first : first + len(rows)]
        is_slow = (rows.dtype, found.dtype) == (torch.float16, torch.bfloat16)
        target.copy_((rows.float().to(found.dtype) if is_slow else rows).reshape(target.shape))
        first += len(rows)
    return found


def read_as(weights: Weights, name: str, wanted: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """One weight in the shape of `wanted`, in `dtype` and, with four dimensions, in `layout`.

    What changes on the way from a file is read through a piece of memory that stays in the processor's cache. Raises
    UserError as `read_number` does.
    """
    place = weights.read.places.get(name) if isinstance(weights.read, FromFiles) else None
    layout = layout if wanted.ndim == 4 else torch.contiguous_format
    if place is None or place.entry.dtype == dtype or not place.entry.dtype.is_floating_point or wanted.ndim < 2:
        return cast(read_number(weights, name, wanted), dtype, layout)
    return joined(place.pieces(BYTES_IN_CACHE), torch.empty(wanted.shape, dtype=dtype, memory_format=layout))


def read_number(weights: Weights, name: str, wanted: Tensor) -> Tensor:
    """One weight in the shape of `wanted`. Raises UserError for whole numbers, which quantised checkpoints hold."""
    value = weights.read(name)
    if wanted.is_floating_point() and not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(
            f"{weights.origin}: {name} holds whole numbers ({kind}), so this is a quantised checkpoint, whose scales "
            "are not read; give one in float32, float16, bfloat16 or float8"
        )
    if name in weights.padded_to:
        value = value[tuple(map(slice, wanted.shape))]
    return value.reshape(wanted.shape)


def fits(weights: Weights, name: str, shape: tuple[int, ...]) -> bool:
    """Return True if a weight has a shape once its padding is cut."""
    has, multiple = weights.shapes[name], weights.padded_to.get(name)
    if multiple is None:
        return same_matrix(has, shape)
    return has == shape or has == tuple(-(-side // multiple) * multiple for side in shape)


def same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Equal shapes, a 1x1 convolution counting as the matrix it is."""
    return a == b or (prod(a) == prod(b) and a[:2] == b[:2] and len(a) != len(b) and set(a[2:] + b[2:]) == {1})
