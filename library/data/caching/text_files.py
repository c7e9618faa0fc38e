"""Files of encoded captions: sd-scripts' names, keys and layout, plus the versions of the caption and what made them.

A file is a numpy archive beside the image, `<stem><suffix>`. Entries have no batch axis:

    <key>              text features of the first caption, as sd-scripts reads them; bfloat16 becomes float32 there
    <key>_variant<n>   ours: those of caption n, bfloat16 as its bits in uint16
    <constant>         what sd-scripts stores beside them, the same for every caption
    captions           ours: JSON as bytes, see `Note`; other programs leave it alone
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from library.base.json_text import parse_json
from library.data.decoding.npz import (
    DAMAGE,
    DAMAGED,
    CacheWords,
    EntryError,
    Verdict,
    describe_damage,
    open_npz,
    open_to_read,
    open_to_write,
    require_plain_file,
    require_small,
)
from library.types import Conditioning, shown_caption

WORDS = CacheWords(
    "text cache", "files", "captions", "cache_text_encoder_outputs",
    "checking text encoder outputs", "caching text encoder outputs",
)  # fmt: skip
FOREIGN = "by another program, which does not name the caption and text encoder"
NOTE = "captions"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
}

Row = Mapping[str, Tensor]
"""Text features of one caption by name, without the batch axis."""

TOKEN_STEP = 64  # batches of captions of different lengths have a multiple of this many tokens


@dataclass(frozen=True)
class Note:
    """The content and origin of a file."""

    texts: list[str]
    identity: str  # of text encoders and settings
    dtypes: dict[str, str]  # of the encoders' outputs
    checksums: dict[str, int]  # of the entries; detects entries rewritten by other programs, which do not update them
    tokenizers: str | None = None  # digest of their vocabularies; None in older files
    settings: str | None = None  # digest of only the settings; None in older files

    @classmethod
    def read(cls, archive: Mapping[str, Any]) -> "Note | None":
        """Read the note of an open archive; None if it is missing or invalid."""
        if NOTE not in archive:
            return None
        try:
            note = cls(**parse_json(np.asarray(archive[NOTE]).tobytes()))
        except (ValueError, TypeError):
            return None
        kinds = (isinstance(note.texts, list), isinstance(note.dtypes, dict), isinstance(note.checksums, dict))
        return note if all(kinds) and all(name in DTYPES for name in note.dtypes.values()) else None


@dataclass(frozen=True)
class Identity:
    """Digests of everything that determines the features of a caption."""

    encoders: str  # including the settings
    settings: str
    tokenizers: str
    is_of_files: bool = False  # the encoders are missing: a file names them, and settings are compared separately


@dataclass(frozen=True, slots=True)
class TextFile:
    """The location of one image's encoded captions."""

    path: str
    keys: tuple[str, ...]

    def note(self) -> Note | None:
        """Read the note of the file; None if it is missing, damaged, or by another program."""
        try:
            with open_npz(self.path) as archive:
                return Note.read(archive)
        except DAMAGE:
            return None

    def read(self, text: str) -> Row:
        """Read the features of a caption, in the dtype of the encoders.

        A file without a note has a single caption, which is trusted. Raises UserError naming a file that is missing,
        damaged, or lacks this caption.
        """
        with open_to_read(self.path, WORDS) as archive:
            note = Note.read(archive)
            if note is None:
                return {key: torch.from_numpy(archive[key]) for key in self.keys}
            if text not in note.texts:
                raise EntryError(f"without the caption {shown_caption(text)!r}")
            return row_in(archive, note, note.texts.index(text), self.keys)


def judge(file: TextFile, texts: Sequence[str], identity: Identity) -> Verdict:
    """Check which of the captions `texts` are cached. Reads only the file's directory and note."""
    try:
        require_plain_file(file.path)
        with zipfile.ZipFile(file.path) as archive:
            require_small(archive)
            # The directory of the archive has a CRC of every entry, so rewritten entries are found without reading
            # them. A flipped bit in an entry is found by zipfile when it is read.
            crc_by_name = {info.filename.removesuffix(".npy"): info.CRC for info in archive.infolist()}
            note_entry = {NOTE: npy_array(archive.read(f"{NOTE}.npy"))} if NOTE in crc_by_name else {}
        note = Note.read(note_entry)
    except DAMAGE as error:
        return Verdict(describe_damage(error))
    if note is None or any(crc_by_name.get(name) != checksum for name, checksum in note.checksums.items()):
        return Verdict(FOREIGN)
    if note.identity != identity.encoders:
        return Verdict("made with other text encoders or settings")
    if identity.is_of_files and note.settings != identity.settings:
        older = "" if note.settings else ", or before files recorded them"
        return Verdict(f"made with other settings{older}")
    # Files that do not record the tokenizer are used.
    if note.tokenizers not in (None, identity.tokenizers):
        return Verdict("made with another tokenizer")
    if not all(entry_name(key, n) in note.checksums for key in file.keys for n in range(len(note.texts))):
        return Verdict(DAMAGED)
    usable = frozenset(texts) & frozenset(note.texts)
    return Verdict(None if len(usable) == len(set(texts)) else "made for other captions", usable)


def entry_name(key: str, number: int) -> str:
    return f"{key}_variant{number}" if number else key


def row_in(archive: Mapping[str, Any], note: Note, number: int, keys: Sequence[str]) -> Row:
    """Return the features of caption `number` in an open archive. Raises EntryError for another dtype."""
    row = {}
    for key in keys:
        values, dtype = np.asarray(archive[entry_name(key, number)]), DTYPES[note.dtypes[key]]
        is_bits = dtype == torch.bfloat16 and values.dtype == np.uint16
        tensor = torch.from_numpy(values.view(np.int16) if is_bits else values)
        # tensor.to() would drop the imaginary part of complex numbers.
        if not is_bits and not torch.can_cast(tensor.dtype, dtype):
            raise EntryError(
                f"holding {key} of the type {values.dtype}, which cannot be converted to {note.dtypes[key]}"
            )
        row[key] = tensor.view(dtype) if is_bits else tensor.to(dtype)
    return row


def write_texts(
    path: str,
    rows: Mapping[str, Row],
    keys: Sequence[str],
    constants: Mapping[str, Tensor],
    identity: Identity,
    keeps_bits: bool = False,
) -> None:
    """Write encoded captions (caption: features), atomically replacing the file. Unless `keeps_bits`, bfloat16 features
    of the first caption are written as float32, as sd-scripts reads it.

    Raises UserError naming a folder that cannot be written.
    """
    arrays = {name: tensor.numpy() for name, tensor in constants.items()}
    dtypes: dict[str, str] = {}
    for number, row in enumerate(rows.values()):
        for key in keys:
            dtypes[key] = str(row[key].dtype).removeprefix("torch.")
            arrays[entry_name(key, number)] = to_array(row[key], keeps_bits or number > 0)
    # Entries are serialized here instead of by np.savez, because the note holds their CRCs.
    contents = {name: npy_bytes(array) for name, array in arrays.items()}
    checksums = {name: zlib.crc32(content) for name, content in contents.items()}
    texts = list(map(str, rows))
    note = Note(texts, identity.encoders, dtypes, checksums, identity.tokenizers, identity.settings)
    contents[NOTE] = npy_bytes(np.frombuffer(json.dumps(asdict(note)).encode(), dtype=np.uint8))
    with open_to_write(path, WORDS) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)


def to_array(tensor: Tensor, keeps_bits: bool) -> NDArray[Any]:
    """Convert to numpy, which lacks bfloat16: either to its bits as uint16, or to float32."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16) if keeps_bits else tensor.float().numpy()


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Serialize one entry of an archive."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npy_array(content: bytes) -> NDArray[Any]:
    """Read the array of one entry of an archive."""
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return array


def stack_rows(rows: Sequence[Row], padding: Mapping[str, float]) -> Conditioning:
    """Stack rows to a batch. Keys in `padding` are padded to the longest along their first axis.

    Captions of different lengths are masked anyway, so they get a multiple of TOKEN_STEP tokens: a GPU builds new plans
    for each new shape. Captions of one length stay as they are, because attention has faster kernels without a mask.
    """
    stacked = {}
    num_tokens = max((len(row[key]) for row in rows for key in padding if row[key].ndim > 1), default=0)
    for key in rows[0]:
        tensors = [row[key] for row in rows]
        dtype = tensors[0].dtype
        # Files of other programs may hold float32 where ours have the encoders' dtype.
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        if key in padding:
            length = max(len(tensor) for tensor in tensors)
            if length == num_tokens and any(len(tensor) < length for tensor in tensors):
                length += -length % TOKEN_STEP
            tensors = [pad_to_length(tensor, length, padding[key]) for tensor in tensors]
        stacked[key] = torch.stack([tensor.to(dtype) for tensor in tensors])
    return stacked


def strip_padding(row: Row, padding: Mapping[str, float]) -> Row:
    """Cut off trailing entries that are padding in all keys of `padding` with that length; `stack_rows` adds them."""
    trimmed = dict(row)
    # Each length separately: tokens and, for example, the positions of reference images differ in number.
    for length in {len(row[key]) for key in padding}:
        keys = [key for key in padding if len(row[key]) == length]
        are_padding_T = [
            (row[key] == padding[key]).flatten(1).all(1) if row[key].ndim > 1 else row[key] == padding[key]
            for key in keys
        ]
        used_T = ~torch.stack(are_padding_T).all(0)
        used_length = int(used_T.nonzero().max()) + 1 if used_T.any() else 1
        trimmed |= {key: row[key][:used_length] for key in keys}
    return trimmed


def pad_to_length(tensor: Tensor, length: int, value: float) -> Tensor:
    """Pad a tensor with `value` to `length` along the first axis."""
    if len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor.new_full((length - len(tensor), *tensor.shape[1:]), value)])
