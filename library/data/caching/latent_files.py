"""Latent cache files: sd-scripts' names, keys and layout, plus a note of each entry's origin.

A file is a numpy archive beside the image, `<stem>_<width>x<height><suffix>` with the image's size. It has an entry for
each training size; keys end in `_<height>x<width>` of the latents:

  latents, latents_flipped   float32 (C, h, w); the second encodes the mirrored image
  original_size              int64 (2,), width and height of the image
  crop_ltrb                  float64 (4,)
  alpha_mask                 float32 (H, W), 0..1, of the bucket in pixels
  reference_0, _1, ...       ours: float32 (C, h, w) of each reference image, in the order of the data set
  reference_0_flipped, ...   ours: those of the mirrored references
  origin                     ours: JSON as bytes, see `Origin`; other programs ignore it

Older files of some base models (`LatentSpec.had_keys_without_size`) have a single entry whose keys have no suffix. It
is valid only for its own size.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.base.json_text import parse_json
from library.data.decoding.npz import (
    DAMAGE,
    CacheWords,
    EntryError,
    Verdict,
    archive_kind,
    describe_damage,
    open_npz,
    open_to_read,
    open_to_write,
)
from library.data.description.buckets import Shape, Size, crop_ltrb
from library.data.description.image_extensions import is_uncompressed
from library.data.plan.seen_references import digest_references
from library.data.scanned.images import HIDES_EDITS, ScannedImage, Version
from library.data.sources.storage.storage import Storage, is_remote
from library.protocols import POSTERIOR_MEAN, LatentSpec

WORDS = CacheWords(
    "latent cache", "entries", "latents", "cache_latents", "checking the latent cache", "caching latents"
)
KIND = archive_kind(
    "a latent cache", lambda entry: entry.startswith(("latents", "original_size", "crop_ltrb", "origin"))
)


@dataclass(frozen=True, slots=True)
class Latents:
    """The encodings of one image. C channels, h and w of the latents, H and W of the bucket."""

    latents_CHW: Tensor
    flipped_CHW: Tensor | None
    alpha_HW: Tensor | None  # uint8
    references: tuple[Tensor, ...] = ()  # CHW each, of their own sizes
    flipped_references: tuple[Tensor, ...] = ()  # empty if flipped_CHW is None


@dataclass(frozen=True, slots=True)
class LatentFile:
    """The location of one image's entry at one size."""

    path: str
    tail: str  # suffix of the keys: "_<height>x<width>" of the latents
    may_lack_tail: bool  # an entry without suffix is valid if it has the right size
    latent_shape: tuple[int, int, int]  # C, h, w
    bucket: Size
    reference_shapes: tuple[tuple[int, int, int], ...] = ()

    def read(self, needs_flipped: bool, needs_alpha: bool) -> Latents:
        """Read the latents and those extras that the options require.

        Raises UserError naming a file that is missing, damaged, of another size, or contains NaN.
        """
        with open_to_read(self.path, WORDS) as archive:
            return latents_in(archive, entry_in(archive, self), needs_flipped, needs_alpha)


@dataclass(frozen=True)
class Origin:
    """A record of what an entry was made from."""

    picture: str  # file name
    picture_bytes: int
    picture_mtime_ns: int  # or another stamp, see storage.Version
    picture_hash: str
    bucket: list[int]
    resized: list[int]
    interpolation: str | None
    vae: str
    checksums: dict[str, int]  # of the arrays; detects entries rewritten by other programs, which do not update them
    references: list[list[Any]] = field(default_factory=list)  # for each reference, see `mark_of_reference`
    is_pair: bool = False  # the reference is the partner of a pair, whose posterior is sampled like the image's

    @property
    def compares_content(self) -> bool:
        """Return True if the image or a reference is uncompressed, so that only its content tells that it changed."""
        return HIDES_EDITS in (self.picture_mtime_ns, *(stamp for _, _, stamp, *_ in self.references))


def latent_file(stem: str, size: Size, shape: Shape, spec: LatentSpec) -> LatentFile:
    """Return the location of an image's entry; `stem` is the image's `Storage.cache_stem`."""
    shapes = [(spec.channels, height // spec.downscale, width // spec.downscale) for width, height in shape.sizes]
    _, height, width = shapes[0]
    path = f"{stem}_{size[0]:04d}x{size[1]:04d}{spec.cache_suffix}"
    return LatentFile(
        path, f"_{height}x{width}", spec.had_keys_without_size, shapes[0], shape.bucket, tuple(shapes[1:])
    )


def entry_in(archive: Mapping[str, Any], file: LatentFile) -> LatentFile:
    """Return the location of the entry in this archive, else of an older entry of the right size without suffix."""
    has_entry = f"latents{file.tail}" in archive
    return replace(file, tail="") if not has_entry and has_older_entry(archive, file) else file


def has_older_entry(archive: Mapping[str, Any], file: LatentFile) -> bool:
    """Return True if the archive has latents without suffix that may be this entry's: they have the right size."""
    return file.may_lack_tail and "latents" in archive and archive["latents"].shape == file.latent_shape


def latents_in(archive: Mapping[str, Any], file: LatentFile, needs_flipped: bool, needs_alpha: bool) -> Latents:
    """Return the arrays of an entry as tensors. Raises EntryError if one is missing or unsuitable."""
    latents = _encoding(archive, f"latents{file.tail}", file.latent_shape, "without latents of this size")
    references = _references(archive, file, "")
    flipped = alpha = None
    flipped_references: tuple[Tensor, ...] = ()
    if needs_flipped:
        flipped = _encoding(archive, f"latents_flipped{file.tail}", file.latent_shape, "without a mirrored copy")
        flipped_references = _references(archive, file, "_flipped")
    if needs_alpha:
        key = f"alpha_mask{file.tail}"
        if key not in archive:
            raise EntryError("without a mask")
        values = np.asarray(archive[key])
        if values.shape != (file.bucket[1], file.bucket[0]):
            raise EntryError(
                f"holding a mask of shape {values.shape} for a bucket of {file.bucket[0]}x{file.bucket[1]}"
            )
        if values.dtype.kind != "f":
            raise EntryError(f"holding a mask of the type {values.dtype}")
        # Masks in memory have 8 bits per pixel, a quarter of the file's float32.
        alpha = torch.from_numpy(np.rint(values * 255).astype(np.uint8))
    return Latents(latents, flipped, alpha, references, flipped_references)


def _references(archive: Mapping[str, Any], file: LatentFile, flipped: str) -> tuple[Tensor, ...]:
    absent = "without the latents of its reference images"
    return tuple(
        _encoding(archive, f"reference_{r}{flipped}{file.tail}", shape, absent)
        for r, shape in enumerate(file.reference_shapes)
    )


def _encoding(archive: Mapping[str, Any], key: str, shape: tuple[int, int, int], absent: str) -> Tensor:
    if key not in archive:
        raise EntryError(absent)
    values = np.asarray(archive[key])
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]  # caches of video VAEs have an axis of one frame
    if values.shape != shape:
        raise EntryError(f"holding latents of shape {values.shape} where {shape} is needed")
    if values.dtype.kind != "f":
        raise EntryError(f"holding latents of the type {values.dtype}, which no VAE produces")
    if not np.isfinite(values).all():
        raise EntryError("holding NaN")
    return torch.from_numpy(values.astype(np.float32, copy=False))


def compute_checksums(archive: Mapping[str, Any], tail: str) -> dict[str, int]:
    """Return a checksum of every latent array of an entry, by name."""
    names = [name for name in ("latents", "latents_flipped") if f"{name}{tail}" in archive]
    names += sorted(key.removesuffix(tail) for key in archive if is_reference(key, tail))
    return {name: zlib.crc32(np.ascontiguousarray(archive[f"{name}{tail}"]).tobytes()) for name in names}


def tail_of(key: str) -> str:
    """Return the suffix of the entry that a key belongs to."""
    (tail,) = re.findall(r"_\d+x\d+$", key) or ("",)
    return tail


def is_reference(key: str, tail: str) -> bool:
    """Return True if `key` is a reference image of the entry with this suffix."""
    return re.fullmatch(rf"reference_\d+(_flipped)?{re.escape(tail)}", key) is not None


def origin_in(archive: Mapping[str, Any], tail: str) -> Origin | None:
    """Return the origin of an entry; None if it has none, or if its arrays have changed since."""
    key = f"origin{tail}"
    if key not in archive:
        return None
    try:
        origin = Origin(**parse_json(np.asarray(archive[key]).tobytes()))
    except (ValueError, TypeError):
        return None
    return origin if origin.checksums == compute_checksums(archive, tail) else None


def origin_of_file(file: LatentFile) -> Origin | None:
    """Return the origin of an entry on disk; None if it is missing, damaged, or by another program."""
    try:
        with open_npz(file.path) as archive:
            return origin_in(archive, entry_in(archive, file).tail)
    except DAMAGE:
        return None


def content_hash(content: bytes) -> str:
    """Return a digest of the content of an image file."""
    return blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Expected:
    """The values that an entry must have been made with."""

    shape: Shape
    interpolation: str | None
    vae: str | None  # None: any
    needs_flipped: bool
    needs_alpha: bool
    is_pair: bool
    seen: int = field(default=0, repr=False)  # `digest_references` of what the text encoder sees; 0 if it sees none


def judge(file: LatentFile, image: ScannedImage, expected: Expected, storage: Storage) -> Verdict:
    """Return whether an entry is valid for the image, and why not.

    An entry with an origin must come from this image (same name, and same size and time or same content), with the same
    crop, filter and VAE. An entry without one was written by sd-scripts: it is accepted if its shape fits the bucket,
    its crop and original size match the image, and the file is not older than the image. Its VAE is unknown. It is
    never accepted for an image with references.
    """
    try:
        with open_npz(file.path) as archive:
            file = entry_in(archive, file)
            latents_in(archive, file, expected.needs_flipped, expected.needs_alpha)
            origin = origin_in(archive, file.tail)
            if origin is not None:
                fault = origin_fault(origin, image, expected, storage)
                return Verdict(fault, compares_content=origin.compares_content)
            if image.references:  # only an origin records the references
                return Verdict("made from unknown reference images")
            return Verdict(foreign_fault(archive, file, image), is_foreign=True)
    except DAMAGE as error:
        return Verdict(describe_damage(error))


def origin_fault(origin: Origin, image: ScannedImage, expected: Expected, storage: Storage) -> str | None:
    """Return what has changed since the entry was written, or None."""
    if expected.vae == f"{origin.vae} {POSTERIOR_MEAN}":
        return "made of random samples by an earlier version, where the VAE's mean is needed"
    if expected.vae is not None and origin.vae != expected.vae:
        return "made with another VAE, or with it in another precision"
    if origin.bucket != list(expected.shape.bucket) or origin.resized != list(expected.shape.resized):
        return "made for another size or crop"
    if origin.interpolation != expected.interpolation:
        return "made with another resize_interpolation"
    made_from = Version(origin.picture_bytes, origin.picture_mtime_ns)
    if origin.picture != os.path.basename(image.key) or not is_unchanged(
        image, made_from, origin.picture_hash, storage
    ):
        return "made from another image"
    if not image.references:
        return None
    if origin.is_pair != expected.is_pair:
        return "made with a reference image where the partner of a pair is needed, or the reverse"
    return references_fault(origin, image, expected, storage)


def references_fault(origin: Origin, image: ScannedImage, expected: Expected, storage: Storage) -> str | None:
    """Return what has changed about the reference images since the entry was written, or None."""
    if len(origin.references) != len(image.references):
        return "made with another number of reference images"
    shapes, records = expected.shape.references, []
    for (digest, num_bytes, stamp, *sizes), reference, shape in zip(
        origin.references, image.references, shapes, strict=True
    ):
        if sizes != [list(shape.bucket), list(shape.resized)]:
            return "made for another size of its reference images"
        if not is_unchanged(reference, Version(num_bytes, stamp), digest, storage):
            return "made from other reference images"
        records.append((digest, shape))
    # The text cache has read all of them, and may have noticed what sizes and times do not show.
    is_known = expected.seen and not any(one.location and is_remote(one.location.file) for one in image.references)
    if is_known and digest_references(records, expected.interpolation) != expected.seen:
        return "made from other reference images"
    return None


def is_unchanged(image: ScannedImage, version: Version, digest: str, storage: Storage) -> bool:
    """Return True if an image still has the content that had this version and digest."""
    current = storage.version(image)
    # A copied or touched file has another time, but only another content makes the entry stale. Another content of the
    # same size and time is likely only where nothing is compressed; elsewhere reading every file would take too long.
    # Entries of earlier versions do not say HIDES_EDITS in their version, but the name may.
    if current == version and not is_uncompressed(image.key):
        return True
    return current.num_bytes == version.num_bytes and content_hash(storage.whole(image)[1]) == digest


def mark_of_reference(digest: str, version: Version, shape: Shape) -> list[Any]:
    """Return the record of a reference image: digest, size and stamp of its file, and its bucket and resized size."""
    return [digest, version.num_bytes, version.stamp, list(shape.bucket), list(shape.resized)]


def foreign_fault(archive: Mapping[str, Any], file: LatentFile, image: ScannedImage) -> str | None:
    """Return why an entry by another program is invalid, or None."""
    size = image.size
    for name, expected in (("original_size", size), ("crop_ltrb", crop_ltrb(file.bucket, size))):
        key = f"{name}{file.tail}"
        values = np.asarray(archive[key]) if key in archive else np.empty(0)
        # Other programs may store integers. Complex numbers would be compared by their real parts.
        is_comparable = values.dtype.kind in "iuf" and values.shape == (len(expected),)
        if not is_comparable or not np.allclose(values, expected, rtol=0, atol=0.01):
            return "made for another size or crop"
    return "older than the image" if is_older(file, image) else None


def is_older(file: LatentFile, image: ScannedImage) -> bool:
    """Return True if a cache file is older than its image; an image in a larger file has no time of its own."""
    return image.location is None and os.stat(file.path).st_mtime_ns < os.stat(image.key).st_mtime_ns


def write_entry(file: LatentFile, latents: Latents, image: ScannedImage, origin: Origin) -> None:
    """Write an entry into its file atomically. Valid entries of other sizes are kept.

    Raises UserError naming a folder that cannot be written.
    """
    values: dict[str, Any] = {
        # float32 is what sd-scripts writes, and numpy has no bfloat16.
        "latents": latents.latents_CHW.float().numpy(),
        "original_size": np.array(image.size, dtype=np.int64),
        "crop_ltrb": np.array(crop_ltrb(file.bucket, image.size), dtype=np.float64),
    }
    if latents.flipped_CHW is not None:
        values["latents_flipped"] = latents.flipped_CHW.float().numpy()
    for flipped, references in (("", latents.references), ("_flipped", latents.flipped_references)):
        values |= {f"reference_{r}{flipped}": reference.float().numpy() for r, reference in enumerate(references)}
    if latents.alpha_HW is not None:
        values["alpha_mask"] = latents.alpha_HW.numpy().astype(np.float32) / 255
    record = asdict(origin) | {"checksums": compute_checksums(values, "")}
    values["origin"] = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)
    arrays = other_entries(file, image) | {f"{name}{file.tail}": array for name, array in values.items()}
    with open_to_write(file.path, WORDS) as temporary, temporary.open("wb") as target:
        np.savez(target, **arrays)


def other_entries(file: LatentFile, image: ScannedImage) -> dict[str, Any]:
    """Return the arrays of the file's other entries; empty if the file is missing or damaged.

    An entry of this size without suffix is left out, because the new entry replaces it. So are entries without an
    origin in a file older than the image: the time of the file, which is about to change, alone tells that they are.
    """
    names = ("latents", "latents_flipped", "original_size", "crop_ltrb", "alpha_mask", "origin")
    replaced_keys = {f"{name}{file.tail}" for name in names}
    try:
        with open_npz(file.path) as archive:
            if has_older_entry(archive, file):
                replaced_keys |= set(names)
            others = [key for key in archive if key not in replaced_keys and not is_reference(key, file.tail)]
            if is_older(file, image):
                others = [key for key in others if origin_in(archive, tail_of(key)) is not None]
            return {key: archive[key] for key in others}
    except DAMAGE:
        return {}
