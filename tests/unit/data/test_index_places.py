"""Indexes lie with the caches if the user names a folder for these, or if the folder of the images is read-only."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.data.caching import latent_index
from library.data.caching.latents import cache_latents
from library.data.plan import reference_digests
from library.data.sources.folders import image_index, reading
from library.data.sources.indexed import parquet_index
from library.options.caching import CachingOptions
from tests.unit.data import builders
from tests.unit.data.builders import averaging_vae, plan_of, unwritable, write_config, write_folder
from tests.unit.data.shard_builders import shards_of, write_parquet

SPEC = replace(builders.SPEC, max_references=1)
LONG_AGO = 1_500_000_000
FOLDERS = ("photos", "before", "shards", "rows")
CONFIG = """
[[datasets]]
resolution = 64
{key}
[[datasets.subsets]]
image_dir = "{{here}}/photos"
caption_extension = ".txt"
control_dirs = ["{{here}}/before"]
[[datasets]]
resolution = 64
{key}
[[datasets.subsets]]
shards = "{{here}}/shards/*.tar"
[[datasets.subsets]]
parquet = "{{here}}/rows/*.parquet"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write photos with captions, their references, two shards and a Parquet file, in folders that count as large."""
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    for name in ("photos", "before"):
        for number, path in enumerate(sorted(write_folder(tmp_path / name, 3).glob("*.png"))):
            # Noise, which cannot be compressed, would be known by its content alone.
            Image.new("RGB", (64, 64), (len(name), number, 0)).save(path)
    shards_of(tmp_path / "photos", tmp_path / "shards", 2)
    images = [path.read_bytes() for path in sorted((tmp_path / "before").glob("*.png"))]
    write_parquet(tmp_path / "rows" / "0.parquet", {"image": images, "caption": ["a tag"] * 3})
    for path in tmp_path.rglob("*.*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which files are read because no index lists them, and which cache entries are opened for a check."""
    names: list[str] = []

    def record(module: object, name: str) -> None:
        function = getattr(module, name)

        def recording(first: object, *rest: object) -> object:
            names.append(os.path.basename(str(getattr(first, "path", first))))
            return function(first, *rest)

        monkeypatch.setattr(module, name, recording)

    record(reading, "read_stamped")
    record(reference_digests, "whole_digest")
    record(parquet_index, "build_table")
    record(latent_index, "judge")
    return names


def start(here: Path, *, key: str = "", **options: object) -> int:
    """Open the data as a start does, and return the number of encoded images."""
    words = {"cache_latents_to_disk": True, "output_dir": str(here / "out"), **options}
    plan = plan_of(write_config(here / "data.toml", CONFIG.format(key=key)).with_values(words), spec=SPEC)
    plan = plan.with_fixed_captions(1).with_seen_references()
    calls: list[int] = []
    on_disk = bool(words["cache_latents_to_disk"])
    cache_latents(plan, averaging_vae(calls), lambda: "vae", CachingOptions(on_disk, on_disk), 1)
    return sum(calls)


def stamps(here: Path) -> dict[str, int]:
    """Return all files in the folders of images, with their times."""
    files = (path for name in FOLDERS for path in (here / name).rglob("*") if path.is_file())
    return {str(path.relative_to(here)): path.stat().st_mtime_ns for path in files}


def indexes(folder: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in folder.rglob(".*index*")}


ALL = {".latent_index.npz", ".picture_index.npz", ".reference_index.npz", ".picture_index"}


@pytest.mark.parametrize("place", ["cache_dir", "cache_directory", "out/cache"])
def test_nothing_is_added_to_folders_of_images(here, read, monkeypatch, place):
    monkeypatch.setattr(image_index, "SETTLED_NS", 0)
    before = stamps(here)
    options: dict[str, object] = {}
    if place == "cache_dir":
        options = {"cache_dir": str(here / place)}
    elif place == "cache_directory":
        options = {"key": f"cache_directory = '{here.as_posix()}/{place}'"}
    with unwritable(*(here / name for name in FOLDERS if place == "out/cache")):
        assert start(here, **options) == 9 + 3  # the references too
        assert read and indexes(here / place) == ALL
        read.clear()
        assert start(here, **options) == 0 and read == []
    assert stamps(here) == before


def test_folders_that_cannot_be_written_keep_an_index_without_caches_too(here, read):
    with unwritable(*(here / name for name in FOLDERS)):
        for num_read in (True, False):
            read.clear()
            start(here, cache_latents_to_disk=False)
            assert bool(read) is num_read
    assert indexes(here / "out/cache") == ALL - {".latent_index.npz"} and not indexes(here / "photos")


def test_indexes_beside_the_images_are_read_and_stay(here, read, monkeypatch):
    monkeypatch.setattr(image_index, "SETTLED_NS", 0)
    start(here)
    before = stamps(here)
    read.clear()
    assert start(here, cache_dir=str(here / "caches")) == 0
    assert read == [] and stamps(here) == before and not indexes(here / "caches")
    (here / "photos" / "p1.txt").write_text("another tag")
    start(here, cache_dir=str(here / "caches"))
    assert read == ["p1.txt"] and indexes(here / "caches") == {".picture_index.npz"}
    start(here, cache_dir=str(here / "caches"))
    assert read == ["p1.txt"]
    (here / "photos" / "p1.txt").write_text("the first tag")
    start(here)
    start(here, cache_dir=str(here / "caches"))
    assert read == ["p1.txt", "p1.txt"]  # the newest index is read, wherever it is


def test_entries_beside_the_images_are_indexed_with_the_caches(here, read, monkeypatch):
    monkeypatch.setattr(image_index, "SETTLED_NS", 0)
    start(here)
    for path in here.rglob(".latent_index.npz"):
        path.unlink()
    before = stamps(here)
    read.clear()
    assert start(here, cache_dir=str(here / "caches")) == 0 and len(read) == 9
    assert start(here, cache_dir=str(here / "caches")) == 0 and len(read) == 9
    assert stamps(here) == before and indexes(here / "caches") == {".latent_index.npz"}


def test_a_dry_run_reads_indexes_and_writes_none(here, read):
    start(here, cache_latents_to_disk=False, dry_run=True)
    assert not any(indexes(folder) for folder in here.iterdir())
    start(here, cache_latents_to_disk=False, cache_dir=str(here / "caches"))
    read.clear()
    start(here, cache_latents_to_disk=False, cache_dir=str(here / "caches"), dry_run=True)
    assert read == []


def test_a_damaged_index_beside_the_images_hides_no_other(here, read, caplog):
    start(here, cache_latents_to_disk=False, cache_dir=str(here / "caches"))
    (here / "photos" / image_index.FILE_NAME).write_bytes(b"damaged")
    read.clear()
    start(here, cache_latents_to_disk=False, cache_dir=str(here / "caches"))
    assert read == [] and caplog.text.count("cannot be used and is rebuilt") == 1
