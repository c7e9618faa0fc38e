"""The source image_dir: a folder of images and their caption files, with masks and reference images in other
folders."""

from library.data.description.schema import SubsetConfig
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders.pairing import add_masks, add_references
from library.data.sources.folders.scan import list_folder
from library.data.sources.storage.source import Source
from library.data.sources.storage.storage import Storage


def scan(config: SubsetConfig, storage: Storage, num_threads: int) -> ScannedSubset:
    """List the images, sorted by name."""
    places = storage.index_places(config)
    listing = list_folder(config, places, num_threads)
    if config.style == "masked":
        add_masks(listing)
    add_references(listing, places, num_threads)
    return listing.to_subset()


SOURCE = Source(("caption_extension", "cache_info", "control_dirs", "opposite_dir", "exclude"), scan)
