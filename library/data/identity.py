"""What the data of a run is, in a few words that two runs can compare."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from os.path import basename
from typing import Any

from library.data.samples import Sample
from library.data.schema import RunDataConfig

WHERE = ("keeps_index", "image_dir", "metadata_file", "conditioning_data_dir", "cache_info")


def dataset_identity(config: RunDataConfig, samples: Sequence[Sample], num_batches: int) -> dict[str, Any]:
    """Counts and digests of pictures, captions and settings. A folder that moved as a whole is the same data."""
    settings = asdict(config)
    for dataset in settings["datasets"]:
        for subset in dataset["subsets"]:
            for name in WHERE:
                subset.pop(name)
    pictures, captions = blake2b(digest_size=16), blake2b(digest_size=16)
    for sample in samples:
        picture = sample.picture
        facts = (ascii(basename(picture.path)), picture.size, sample.subset, sample.shape, sample.num_draws)
        pictures.update(repr(facts).encode())
        captions.update(ascii(picture.caption).encode() + b"\0")
    return {
        "num_pictures": len(samples),
        "num_batches": num_batches,
        "pictures": pictures.hexdigest(),
        "captions": captions.hexdigest(),
        "settings": blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest(),
    }
