"""The identity of a run's data, which two runs can compare."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import islice
from os.path import basename
from pathlib import Path
from typing import Any

from library.checkpoints.hashes import digest_of_file
from library.data.decoding.threads import read_many
from library.data.description.schema import RunDataConfig, SubsetConfig
from library.data.description.source_keys import COMMIT, HUB_SOURCE
from library.data.plan.samples import Samples

MAX_IMAGES = 20_000  # reading every file of a larger set would delay the start
PART_BYTES = 1 << 17
AT_ONCE = 4096  # images hashed together
REVISIONS = "revisions"  # key of a state

WHERE = (
    "entries", "image_dir", "prompt", "num", "metadata_file", "conditioning_data_dir", "source_key",
    "control_dirs", "opposite_dir", "control_resolution", "control_no_resize",  # covered by the digest of the images
    "exclude", "cache_directory", "patterns", "image_column", "caption_column", "control_columns",
    "dataset_config_name", "dataset_split",
)  # fmt: skip


def image_digests(samples: Samples, num_threads: int) -> list[str]:
    """Return the digests of all image files, followed by those of reference images and masks; empty for very large
    sets.

    Digests of images in larger files come from the index, others from `content_digests`.
    """
    if len(samples) > MAX_IMAGES:
        return []
    references, mask_paths = samples.references, samples.mask_paths
    if len(samples) + len(references) + len(mask_paths) > MAX_IMAGES:
        return []
    images = [
        digest
        for images in samples.subsets
        for digest in (
            content_digests(list(images.each_key()), num_threads)
            if images.locations is None
            else [digest.tobytes().hex()[:8] for digest in images.locations.digest_N16]
        )
    ]
    files = [reference.key for reference in references if reference.location is None]
    digest_by_file = dict(zip(files, content_digests(files, num_threads), strict=True))
    reference_digests = [
        digest_by_file[reference.key] if reference.location is None else reference.location.digest[:8]
        for reference in references
    ]
    return [*images, *reference_digests, *content_digests(mask_paths, num_threads)]


def content_digests(paths: Sequence[str], num_threads: int) -> list[str]:
    """Return a short digest of each file's length and first, middle and last 128 KB; empty for very large sets.

    A file that an editor has saved again differs in these. An unreadable file has an empty digest.
    """
    return read_many(content_digest, paths, num_threads) if len(paths) <= MAX_IMAGES else []


def content_digest(path: str) -> str:
    """Return the digest of one file as eight hexadecimal digits; "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            digest = blake2b(str(num_bytes).encode(), digest_size=4)
            for start in sorted({0, max(0, (num_bytes - PART_BYTES) // 2), max(0, num_bytes - PART_BYTES)}):
                file.seek(start)
                digest.update(file.read(PART_BYTES))
    except OSError:
        return ""
    return digest.hexdigest()


def whole_digest(path: str) -> str:
    """Return the digest of a file's whole content; "" if it cannot be read."""
    try:
        return digest_of_file(Path(path))
    except OSError:
        return ""


def dataset_identity(
    config: RunDataConfig, samples: Samples, num_batches: int, scanned_as: Sequence[SubsetConfig] = ()
) -> dict[str, Any]:
    """Return counts and digests of images, captions and settings. Moving a folder as a whole does not change them.

    `scanned_as` are the subsets with the commits of data sets of the hub.
    """
    settings = asdict(config)
    for dataset in settings["datasets"]:
        dataset.pop("skip_image_resolution")  # changes the list of images, which is covered
        for subset in dataset["subsets"]:
            for name in WHERE:
                subset.pop(name)
            subset.pop("is_forgetting_probe")  # changes the list of images, too
            # States of runs without the key may have been saved before it existed.
            for name in ("enable_multiline_caption", "fixed", "trigger_word"):
                if not subset["captions"][name]:
                    subset["captions"].pop(name)
            for name in ("brightness_aug", "contrast_aug", "saturation_aug"):
                if not subset[name]:
                    subset.pop(name)
    images, captions = blake2b(digest_size=16), blake2b(digest_size=16)
    first = 0
    for subset, scanned in enumerate(samples.subsets):
        rows = slice(first, first + len(scanned))
        first += len(scanned)
        numbers = zip(
            *scanned.sizes_N2.T.tolist(), samples.shape_N[rows].tolist(), samples.draws_N[rows].tolist(), strict=True
        )
        # The digested text is the repr of one tuple per image: states hold digests of it. The part that many images
        # share is built once.
        parts_by_row: dict[tuple[int, ...], str] = {}  # everything but the name
        parts: list[str] = []
        for name, row in zip(scanned.names, numbers, strict=True):
            if row not in parts_by_row:
                width, height, shape, num_draws = row
                parts_by_row[row] = repr(((width, height), subset, samples.shapes[shape], num_draws))[1:]
            parts.append(f"({ascii(basename(name))!r}, {parts_by_row[row]}")
            if len(parts) == AT_ONCE:
                images.update("".join(parts).encode())
                parts.clear()
        images.update("".join(parts).encode())
        for shape, references in zip(samples.shape_N[rows].tolist(), scanned.references or (), strict=False):
            names_and_sizes = [(basename(reference.key), reference.size) for reference in references]
            images.update(f"{names_and_sizes!a}{samples.shapes[shape].references}".encode())
        remaining = iter(scanned.captions)
        while block := list(islice(remaining, AT_ONCE)):
            captions.update("".join([f"{caption!a}\0" for caption in block]).encode())
    return {
        **list_commits(scanned_as),
        "num_pictures": len(samples),
        "num_batches": num_batches,
        "pictures": images.hexdigest(),
        "captions": captions.hexdigest(),
        "settings": blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest(),
    }


def list_commits(subsets: Sequence[SubsetConfig]) -> dict[str, dict[str, str]]:
    """Return the commits of data sets of the hub by their names, as a state has them; {} without any."""
    names = [name for subset in subsets if subset.source_key == HUB_SOURCE for name in subset.patterns]
    commits = dict(name.split("@") for name in names if re.fullmatch(f"[^@]+@{COMMIT}", name))
    return {REVISIONS: commits} if commits else {}
