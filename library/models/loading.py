"""Loading of weights into modules.

A module is built on the meta device and takes its weights directly in the training dtype. Nothing is initialised twice,
and peak memory is about the size of the weights.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.base.errors import NotThere, about, list_few, of_file
from library.checkpoints.quantised import multiply_scales, rotate_groups
from library.checkpoints.weights import FromFiles, Weights
from library.memory.codecs.codec import AS_IN_FILE, AsInFile, AsRead, Codec, RequestedFormat
from library.memory.codecs.plain import Plain
from library.memory.codecs.scaled import Scaled
from library.memory.codecs.weight_format import load_format
from library.memory.devices import channels_last_where_it_fits
from library.memory.frozen import freeze_encoded, freeze_layer, layers_in_blocks
from library.models.shapes import shape_of

logger = logging.getLogger(__name__)

# Bytes that are converted at a time, few enough to stay in the processor's cache: reading a U-Net checkpoint from
# float16 into bfloat16 takes 0.95 instead of 1.25 CPU seconds.
BYTES_IN_CACHE = 1 << 19


@dataclass(frozen=True)
class Component:
    """A model that is not loaded yet: its configuration, and its weights named by module path."""

    config: Mapping[str, Any]
    weights: Weights


@dataclass(frozen=True)
class Absent:
    """A `Component` whose files are missing; any use raises the error that says so."""

    error: NotThere

    @property
    def config(self) -> Mapping[str, Any]:
        raise self.error.with_traceback(None)

    @property
    def weights(self) -> Weights:
        raise self.error.with_traceback(None)


MaybeComponent = Component | Absent
LoadPart = Callable[[MaybeComponent, torch.dtype], nn.Module]
ComponentT = TypeVar("ComponentT")
ConfigT = TypeVar("ConfigT")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def open_if_there(may_be_absent: bool, open_it: Callable[[], ComponentT]) -> ComponentT | Absent:
    """Call `open_it`. If a run can do without the component, return Absent instead of raising NotThere."""
    try:
        return open_it()
    except NotThere as error:
        if not may_be_absent:
            raise
        return Absent(error)


def build_on_meta_device(model: Callable[[ConfigT], ModuleT], config: ConfigT) -> ModuleT:
    """Build a model on the meta device, to be filled by `materialise`."""
    with torch.device("meta"):
        return model(config)


def empty_diffusers_model(kind: str, config: Mapping[str, Any]) -> Any:
    """Build a model of the diffusers class `kind` on the meta device."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(dict(config))


def empty_transformers_model(family: str, kind: str, config: Mapping[str, Any], **options: Any) -> Any:
    """Build transformers' model `kind` ("Qwen3VLText") of a `family` ("qwen3_vl") with weights on the meta device.

    Buffers that no file contains, such as rotary angles, are real.
    """
    from accelerate import init_empty_weights

    configuration = import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    # An encoder runs once per caption, so a cache of keys and values would only take memory.
    settings = getattr(configuration, f"{kind}Config").from_dict({**config, "use_cache": False}, **options)
    with init_empty_weights(include_buffers=False):
        return getattr(modeling, f"{kind}Model")(settings)


def load_component(
    build: Callable[[Mapping[str, Any]], nn.Module], component: MaybeComponent, dtype: torch.dtype
) -> nn.Module:
    """Build a model from a component's configuration and load its weights in `dtype`, frozen, on the CPU."""
    return materialise(build(component.config), component.weights, dtype)


def text_encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a text encoder whose states overflow float16: bfloat16 instead of float16, else `dtype`."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def get_first_side(component: Component | Absent, name: str) -> int | None:
    """Return the first dimension of a weight, for embeddings the vocabulary size; None if the files are missing."""
    return None if isinstance(component, Absent) else shape_of(component.weights.shapes, name)[0]


def check_text_width(
    flag: str, component: MaybeComponent, embedding: str, width: int, expected: str, num_states: int = 1
) -> None:
    """Raise UserError if a text encoder is present and `num_states` of its states side by side differ from `width`,
    the transformer's text width.

    `embedding` is the name of its word embedding; `expected` names the right encoder in the message.
    """
    if not isinstance(component, Component):
        return
    text_width = shape_of(component.weights.shapes, embedding)[1]
    if num_states * text_width != width:
        states = "text features of" if num_states == 1 else f"{num_states} states of"
        raise about(flag, component.weights.origin, cause="does not fit")(
            f"has width {text_width}, but the transformer expects {states} width {width / num_states:g}",
            f"use {expected}",
        )


def materialise(
    model: nn.Module, weights: Weights, dtype: torch.dtype, weight_format: RequestedFormat | None = None
) -> nn.Module:
    """Load weights in `dtype` into a module on the meta device, and return it frozen and in evaluation mode.

    With a `weight_format` the weights inside its blocks are stored in that format as they are read: peak memory is the
    result and one weight. Weights that the file already has in that format, or in any 8-bit format with AS_IN_FILE, are
    kept as stored unless `AsRead.changes` names them. With `AsRead.shard` every layer is stored in some format.

    Raises UserError naming missing weights and wrong shapes; warns of unknown names.
    """
    expected = model.state_dict()
    # Names and shapes are known before any weight is read, so a wrong file is refused at once.
    check_names(weights, expected, type(model).__name__)
    check_shapes(weights, expected, type(model).__name__)
    layout = channels_last_where_it_fits(expected.values())
    request = weight_format if isinstance(weight_format, AsRead) else AsRead(weight_format)
    reader = WeightReader(weights, expected, dtype, layout, request.changes)
    stored = store_blocks(model, reader, request)
    tensors = {name: reader.read(name) for name in expected if name not in stored}
    # Stored layers have other parameters than `weight`, and have them already.
    model.load_state_dict(tensors, assign=True, strict=not stored)
    return model.requires_grad_(False).eval()


def check_names(weights: Weights, expected: Mapping[str, Tensor], model: str) -> None:
    """Raise UserError for missing weights; warn of unknown names."""
    missing = [name for name in expected if name not in weights.shapes]
    if missing:
        raise of_file(weights.origin, cause="missing")(
            f"is incomplete: {len(missing)} of the {len(expected)} weights of {model} are missing: {list_few(missing)}"
        )
    # Older versions of transformers saved position_ids, which are no weights.
    unknown = [name for name in weights.shapes if name not in expected and not name.endswith("position_ids")]
    if unknown:
        logger.warning(
            "%s: ignoring weights that %s does not have (%d): %s",
            weights.origin, model, len(unknown), list_few(unknown),
        )  # fmt: skip


def check_shapes(weights: Weights, expected: Mapping[str, Tensor], model: str) -> None:
    """Raise UserError for weights whose shape differs from the model's."""
    wrong = [name for name, tensor in expected.items() if not fits(weights, name, tuple(tensor.shape))]
    if wrong:
        has, needs = weights.shapes[wrong[0]], tuple(expected[wrong[0]].shape)
        raise of_file(weights.origin, cause="does not fit")(
            f"does not fit {model}: {wrong[0]} has shape {has} instead of {needs} (wrong shapes: {len(wrong)})"
        )


@dataclass(frozen=True)
class WeightReader:
    """Reader of one model's weights in their target shape, dtype and memory layout."""

    weights: Weights
    expected: Mapping[str, Tensor]
    dtype: torch.dtype
    layout: torch.memory_format
    changes: Mapping[str, Callable[[Tensor], Tensor]]  # by parameter name, see `AsRead`

    def read(self, name: str) -> Tensor:
        value = read_as(self.weights, name, self.expected[name], self.dtype, self.layout)
        change = self.changes.get(name)
        return value if change is None else change(value)

    def keep_quantised(self, name: str, layer: nn.Module, codec: Codec | AsInFile | None) -> bool:
        """Give a layer its weight as the file stores it. Return False if that is not in `codec`, or is changed."""
        quantised = None if name in self.changes else self.weights.quantised.get(name)
        if quantised is None or codec not in (AS_IN_FILE, load_format(quantised.kind).codec):
            return False
        parts = quantised.read()
        if parts is None:
            return False
        rotate = partial(rotate_groups, group_size=quantised.group_size) if quantised.group_size else None
        freeze_encoded(Scaled(multiply_scales, rotate), layer, parts, self.expected[name].shape, self.dtype)
        return True


def store_blocks(model: nn.Module, reader: WeightReader, request: AsRead) -> set[str]:
    """Store the weights inside the model's blocks in the requested format, and return their names."""
    if request.codec is None and request.shard is None:
        return set()
    codec = None if isinstance(request.codec, AsInFile) else request.codec
    # `shard` needs the parts of a frozen layer; plain storage changes no value.
    if codec is None and request.shard is not None:
        codec = Plain()
    stored = set()
    for path, layer in layers_in_blocks(model).items():
        name = f"{path}.weight"
        if not reader.keep_quantised(name, layer, request.codec):
            if codec is None:
                continue
            freeze_layer(codec, layer, reader.read(name))
        stored.add(name)
        if request.shard is not None:
            request.shard(layer)
    return stored


def cast(value: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Return `value.to(dtype, memory_format=layout)` bit for bit, by a faster way where torch is slow."""
    # Usually one pass converts dtype and layout: each further pass over a U-Net takes as long as reading it. But torch
    # converts float16 to bfloat16 one number at a time. The way through float32 is exact and takes a quarter of the
    # time (half if the layout changes too), as long as the parts stay in the processor's cache.
    is_slow = (value.dtype, dtype, value.device.type) == (torch.float16, torch.bfloat16, "cpu")
    if not is_slow or value.ndim == 0 or value.numel() == 0:
        return value.to(dtype, memory_format=layout)
    num_rows = max(1, BYTES_IN_CACHE * len(value) // value.nbytes)
    return join_pieces(torch.split(value, num_rows), torch.empty_like(value, dtype=dtype, memory_format=layout))


def join_pieces(pieces: Iterable[Tensor], joined: Tensor) -> Tensor:
    """Copy the rows of all pieces into `joined`, converted to its dtype and layout, and return it."""
    first = 0
    for rows in pieces:
        target = joined[first : first + len(rows)]
        is_slow = (rows.dtype, joined.dtype) == (torch.float16, torch.bfloat16)
        target.copy_((rows.float().to(joined.dtype) if is_slow else rows).reshape(target.shape))
        first += len(rows)
    return joined


def read_as(weights: Weights, name: str, expected: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Read one weight in the shape of `expected` and in `dtype`, with four dimensions also in `layout`.

    Weights that need conversion are read through a buffer that stays in the processor's cache. Raises UserError like
    `read_number`.
    """
    source = weights.read.places.get(name) if isinstance(weights.read, FromFiles) else None
    layout = layout if expected.ndim == 4 else torch.contiguous_format
    is_stored_so = source is not None and source.dtype == dtype and expected.is_contiguous(memory_format=layout)
    if source is None or is_stored_so or not source.dtype.is_floating_point or expected.ndim < 2:
        return cast(read_number(weights, name, expected), dtype, layout)
    return join_pieces(source.pieces(BYTES_IN_CACHE), torch.empty(expected.shape, dtype=dtype, memory_format=layout))


def read_number(weights: Weights, name: str, expected: Tensor) -> Tensor:
    """Read one weight in the shape of `expected`.

    Raises UserError for integers, which unsupported quantised checkpoints contain.
    """
    value = weights.read(name)
    if expected.is_floating_point() and not value.is_floating_point():
        dtype_name = str(value.dtype).removeprefix("torch.")
        raise of_file(weights.origin, cause="does not fit")(
            f": {name} holds integers ({dtype_name}), so this is a quantised checkpoint in an unsupported format",
            "use one in float32, float16, bfloat16 or float8",
        )
    if name in weights.padded_to:
        value = value[tuple(map(slice, expected.shape))]
    return value.reshape(expected.shape)


def fits(weights: Weights, name: str, shape: tuple[int, ...]) -> bool:
    """Return True if a weight has this shape once its padding is removed."""
    stored_shape, multiple = weights.shapes[name], weights.padded_to.get(name)
    if multiple is None:
        return is_same_matrix(stored_shape, shape)
    return stored_shape == shape or stored_shape == tuple(-(-side // multiple) * multiple for side in shape)


def is_same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return True for equal shapes; a 1x1 convolution counts as a matrix."""
    return a == b or (prod(a) == prod(b) and a[:2] == b[:2] and len(a) != len(b) and set(a[2:] + b[2:]) == {1})
