"""A checkpoint to load a model from: names and shapes are known, values are read one by one on request."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from hashlib import blake2b
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from library.base.errors import list_few, of_file
from library.base.json_text import parse_json
from library.checkpoints.files import TORCH_DTYPES, load_state_dict, require_dtypes
from library.checkpoints.headers import LENGTH_BYTES, TensorEntry, holds_safetensors, read_header, require_weight_file

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Quantised:
    """A weight stored as 8-bit codes with scales."""

    kind: str  # the --base_format with the same codes
    group_size: int | None  # inputs that share a rotation; None without rotation
    read: Callable[[], Mapping[str, Tensor] | None]  # returns `codes` and `scales`, or None if the weight is not 8-bit


@dataclass(frozen=True)
class Weights:
    """The tensors of one or several files: names, shapes, and a function that reads one tensor."""

    origin: str  # the path, for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]  # into newly allocated memory
    quantised: Mapping[str, Quantised] = field(default_factory=dict)  # weights that `read` decodes
    metadata: Mapping[str, str] = field(default_factory=dict)  # from the headers
    padded_to: Mapping[str, int] = field(default_factory=dict)  # matrices whose sides are padded to a multiple of this


@dataclass(frozen=True)
class Place:
    """The location of a tensor in a safetensors file."""

    path: Path
    opened: os.stat_result  # of the file when its header was read
    start: int
    entry: TensorEntry

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.entry.dtype]

    def read(self) -> Tensor:
        """Read the tensor into new memory. Raises UserError if the file has changed since its header was read."""
        raw = torch.empty(self.entry.end - self.entry.start, dtype=torch.uint8)
        with self._at_start() as file:
            read_into(file, raw.numpy().data, self.path)
        return raw.view(self.dtype).reshape(self.entry.shape)

    def pieces(self, num_bytes: int) -> Iterator[Tensor]:
        """Yield the rows in order, about `num_bytes` at a time, in a buffer that is reused."""
        shape = self.entry.shape
        size_of_row = prod(shape[1:]) * self.dtype.itemsize
        num_rows = min(shape[0], max(1, num_bytes // max(1, size_of_row)))
        # A small buffer that is reused stays in the processor's cache. Casting float16 files through one takes a
        # quarter less CPU time than casting whole tensors.
        rows = torch.empty(num_rows, *shape[1:], dtype=self.dtype)
        with self._at_start() as file:
            for left in range(shape[0], 0, -max(1, num_rows)):
                piece = rows[:left]
                read_into(file, piece.reshape(-1).view(torch.uint8).numpy().data, self.path)
                yield piece

    @contextmanager
    def _at_start(self) -> Iterator[RawIOBase]:
        # Unbuffered, so that data goes from the file to the tensor's memory without another copy.
        with self.path.open("rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (self.opened.st_size, self.opened.st_mtime_ns):
                raise of_file(self.path)("was changed while it was being read", "start again")
            file.seek(self.start)
            yield file


@dataclass(frozen=True)
class FromFiles:
    """A reader of tensors as safetensors files store them."""

    places: Mapping[str, Place]

    def __call__(self, name: str) -> Tensor:
        return self.places[name].read()

    def under(self, old_names: Mapping[str, str]) -> "FromFiles":
        return FromFiles({new: self.places[old] for new, old in old_names.items()})


LoaderT = TypeVar("LoaderT")
FIRST_FILE = re.compile(r"(.*)00001-of-(\d{5})(\.\w+)")  # of a sharded checkpoint without index


def to_meta_device(loader: LoaderT) -> LoaderT:
    """Return a copy of a loader (a frozen dataclass) whose models are on the meta device; nothing is read.

    Every `Weights` in its fields, however deeply nested, returns meta tensors.
    """

    def on_meta_device(value: Any) -> Any:
        if isinstance(value, Weights):
            shapes = value.shapes
            quantised = {name: codes_on_meta_device(q, shapes[name]) for name, q in value.quantised.items()}
            return replace(value, read=lambda name: torch.empty(shapes[name], device="meta"), quantised=quantised)
        if isinstance(value, list | tuple):
            return type(value)(on_meta_device(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: on_meta_device(getattr(value, f.name)) for f in fields(value) if f.init})
        return value

    meta_loader: LoaderT = on_meta_device(loader)
    return meta_loader


def codes_on_meta_device(quantised: Quantised, shape: tuple[int, ...]) -> Quantised:
    """Replace codes and scales by meta tensors, with one scale per row."""

    def read() -> Mapping[str, Tensor]:
        codes = torch.empty(shape, dtype=torch.int8, device="meta").flatten(1)
        return {"codes": codes, "scales": torch.empty(len(codes), 1, device="meta")}

    return replace(quantised, read=read)


def open_weights(path: Path) -> Weights:
    """Open a weight file or a sharded checkpoint (by its `*.index.json` or its first file), without decoding.

    Content, not the name, distinguishes safetensors from torch's pickles. Raises UserError naming the file if it is
    truncated, of another type, or a pickle with more than tensors.
    """
    if path.suffix == ".json":  # model.safetensors.index.json, or index.fp16.json
        return open_sharded(path)
    if (first := FIRST_FILE.fullmatch(path.name)) is not None:
        return open_numbered(path, first[1], int(first[2]), first[3])
    return open_one(path)


def open_one(path: Path) -> Weights:
    """Open one weight file, whatever its name. Raises UserError as `open_weights` does."""
    require_weight_file(path)
    if holds_safetensors(path):
        return open_safetensors(path)
    tensors = load_state_dict(path, mmap=True)
    return Weights(
        str(path), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda name: tensors[name].clone()
    )


def open_safetensors(path: Path) -> Weights:
    """Open one safetensors file; only its header is read until the first tensor is requested."""
    # Tensors are read into their own memory, not mapped: the peak is one copy, and the file may be replaced afterwards.
    stat_at_open = path.stat()
    header = read_header(path)
    require_dtypes(path, header)
    data_start = LENGTH_BYTES + header.num_bytes
    places = {
        name: Place(path, stat_at_open, data_start + entry.start, entry) for name, entry in header.tensors.items()
    }
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    return Weights(str(path), shapes, FromFiles(places), metadata=header.metadata)


def fingerprint(*parts: Weights) -> str:
    """Return a digest of the names, shapes, dtypes and values of checkpoints, independent of file names.

    The order of the checkpoints counts. Everything is read once, tensor by tensor, in up to 8 threads.
    """

    def digest(entry: tuple[Weights, str]) -> bytes:
        weights, name = entry
        tensor = weights.read(name).contiguous()
        tensor_hash = blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        tensor_hash.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor_hash.digest()

    total_hash = blake2b(digest_size=16)
    entries = [(weights, name) for weights in parts for name in sorted(weights.shapes)]
    # Threads suffice, because hashlib and file reads release the GIL.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for tensor_digest in pool.map(digest, entries):
            total_hash.update(tensor_digest)
    return total_hash.hexdigest()


def read_into(file: RawIOBase, buffer: memoryview, path: Path) -> None:
    """Fill `buffer` in several reads, because one system call reads at most about 2 GiB.

    Raises UserError if the file ends early.
    """
    while buffer:
        num_bytes = file.readinto(buffer)
        if not num_bytes:
            raise of_file(path)("ended while it was being read", "download or copy it again")
        buffer = buffer[num_bytes:]


def open_sharded(index: Path) -> Weights:
    """Open the files listed in an `*.index.json` as one checkpoint. Raises UserError for missing files and tensors."""
    weight_map = read_weight_map(index)
    missing = sorted(name for name in set(weight_map.values()) if not os.path.isfile(index.parent / name))
    if missing:
        raise of_file(index, cause="missing")(
            f"lists files that are not next to it: {', '.join(missing)}", "download them too"
        )
    files = {name: open_one(index.parent / name) for name in sorted(set(weight_map.values()))}
    absent = sorted(name for name, file in weight_map.items() if name not in files[file].shapes)
    if absent:
        raise of_file(index)(f"lists weights missing from its files: {', '.join(absent[:3])}", "download it again")
    return join_weights(str(index), files, weight_map)


def open_numbered(first: Path, stem: str, count: int, suffix: str) -> Weights:
    """Open a checkpoint of `count` numbered files, given the first one. Raises UserError for missing files."""
    names = [f"{stem}{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]
    missing = [name for name in names if not (first.parent / name).is_file()]
    if missing:
        raise of_file(first)(f"is the first of {count} files, but these are not next to it: {list_few(missing)}")
    files = {name: open_one(first.parent / name) for name in names}
    return join_weights(str(first), files, {key: name for name in names for key in files[name].shapes})


def join_weights(origin: str, parts: Mapping[str, Weights], part_of: Mapping[str, str]) -> Weights:
    """Combine several parts into one checkpoint; `part_of` names the part of each tensor."""
    owners = {name: parts[part] for name, part in part_of.items()}
    places = {name: owner.read.places[name] for name, owner in owners.items() if isinstance(owner.read, FromFiles)}
    return Weights(
        origin,
        shapes={name: owner.shapes[name] for name, owner in owners.items()},
        read=FromFiles(places) if len(places) == len(owners) else lambda name: owners[name].read(name),
        quantised={name: owner.quantised[name] for name, owner in owners.items() if name in owner.quantised},
        metadata={key: value for part in parts.values() for key, value in part.metadata.items()},
        padded_to={name: owner.padded_to[name] for name, owner in owners.items() if name in owner.padded_to},
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the file name of each tensor from an index. Raises UserError for invalid content and for paths out of the
    folder."""
    try:
        content = parse_json(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise of_file(index, cause="unreadable")(f"is not valid JSON: {error}", "download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise of_file(index)("has no weight_map of tensor names to file names", "download it again")
    outside = sorted(file for file in set(weight_map.values()) if Path(file).name != file)
    if outside:
        raise of_file(index)(f"names files outside its folder: {', '.join(outside[:3])}; they are not opened")
    return dict(weight_map)


def select_weights(weights: Weights, old_names: Mapping[str, str]) -> Weights:
    """Return the tensors in `old_names`, which maps new names to old ones."""
    read_tensor = weights.read
    return replace(
        weights,
        shapes={new: weights.shapes[old] for new, old in old_names.items()},
        read=read_tensor.under(old_names)
        if isinstance(read_tensor, FromFiles)
        else lambda name: read_tensor(old_names[name]),
        quantised={new: weights.quantised[old] for new, old in old_names.items() if old in weights.quantised},
        padded_to={new: weights.padded_to[old] for new, old in old_names.items() if old in weights.padded_to},
    )


def rename_weights(weights: Weights, rename: Callable[[str], str]) -> Weights:
    return select_weights(weights, {rename(key): key for key in weights.shapes})


def with_prefix(weights: Weights, prefix: str) -> Weights:
    """Return the tensors with this prefix, without it."""
    return select_weights(weights, {key[len(prefix) :]: key for key in weights.shapes if key.startswith(prefix)})


def find_prefix(names: Iterable[str], prefixes: Sequence[str]) -> str:
    """Return the first of `prefixes` that some name begins with. The last prefix must be ""."""
    return next(prefix for prefix in prefixes if not prefix or any(name.startswith(prefix) for name in names))


def list_first_names(weights: Weights) -> str:
    """Return the first three tensor names of a file, for messages."""
    return ", ".join(list(weights.shapes)[:3]) or "none"


def configure(weights: Weights, read_config: Callable[[Mapping[str, tuple[int, ...]]], ConfigT]) -> ConfigT:
    """Derive a configuration from the shapes with `read_config`. Raises UserError naming the file for a ValueError."""
    try:
        return read_config(weights.shapes)
    except ValueError as error:
        raise of_file(weights.origin)(f": {error}") from None
