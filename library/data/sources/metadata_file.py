"""The source metadata_file: a JSON or JSONL file with captions and tags of images elsewhere."""

from library.data.description.schema import SubsetConfig
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders.metadata_listing import list_metadata
from library.data.sources.folders.pairing import add_references
from library.data.sources.storage.source import Source
from library.data.sources.storage.storage import Storage


def scan(config: SubsetConfig, storage: Storage, num_threads: int) -> ScannedSubset:
    """List the images in the order of the file."""
    places = storage.index_places(config)
    listing = list_metadata(config, places, num_threads)
    add_references(listing, places, num_threads)
    return listing.to_subset()


SOURCE = Source(("control_dirs", "opposite_dir"), scan)
