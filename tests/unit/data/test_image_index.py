"""The index of a folder saves reading its files and always agrees with them, wherever it lies."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.data.caching import latent_index
from library.data.caching.latents import cache_latents
from library.data.decoding import index_file
from library.data.decoding.threads import BLOCK, read_many
from library.data.plan import reference_digests
from library.data.plan.data_plan import DataPlan
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.folders import image_index, reading, scan
from library.data.sources.indexed import parquet_index
from library.data.sources.storage.index_places import IndexPlaces
from library.options.caching import CachingOptions
from tests.unit.data import builders
from tests.unit.data.builders import averaging_vae, plan_of, unwritable, write_config, write_folder, write_image
from tests.unit.data.shard_builders import shards_of, write_parquet

LONG_AGO = 1_500_000_000

CONFIG = """
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
[[datasets.subsets]]
image_dir = "{here}/pictures"
caption_extension = ".txt"
num_repeats = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write five images and captions with old modification times, in a folder that counts as large."""
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    folder = write_folder(tmp_path / "pictures", 4, caption="a tag")
    write_image(folder / "wide.png", (128, 64))
    (folder / "p3.txt").write_text("\ufefffirst\r\n\r\nsecond ねこ\n", encoding="utf-8")
    make_old(folder)
    return folder


def make_old(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))


def build(folder: Path, subset: str = "") -> DataPlan:
    return plan_of(write_config(folder.parent / "data.toml", CONFIG + subset))


def fields_of(built: DataPlan) -> tuple[object, ...]:
    """Return everything in a plan as plain values."""
    buckets = [(b.dataset, b.size, b.batch_size, list(b.draws)) for b in built.draws.buckets]
    return (built.datasets, built.rules, list(built.samples), built.draws.sample_of_draw.tolist(), buckets)


def build_without_index(folder: Path, subset: str = "") -> DataPlan:
    """Build from a copy of the folder without its index, which temporarily replaces the folder."""
    original = folder.with_name("kept")
    folder.rename(original)
    shutil.copytree(original, folder, symlinks=True, ignore=shutil.ignore_patterns(image_index.FILE_NAME))
    try:
        return build(folder, subset)
    finally:
        shutil.rmtree(folder)
        original.rename(folder)


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records the names of files as they are read."""
    names: list[str] = []
    read_stamped = reading.read_stamped

    def recording(path: str, num_bytes: int | None = None) -> tuple[os.stat_result, bytes]:
        names.append(os.path.basename(path))
        return read_stamped(path, num_bytes)

    monkeypatch.setattr(reading, "read_stamped", recording)
    return names


@pytest.mark.parametrize("subset", ["", 'enable_wildcard = true\nclass_tokens = "cat"\n'])
def test_a_build_from_the_index_equals_one_from_scratch_and_reads_nothing(folder, read_names, subset):
    first = fields_of(build(folder, subset))
    assert (folder / image_index.FILE_NAME).is_file() and len(read_names) == 9
    read_names.clear()
    assert fields_of(build(folder, subset)) == first
    assert read_names == []
    assert fields_of(build_without_index(folder, subset)) == first


def test_one_index_serves_wildcards_and_first_lines(folder, read_names):
    plain = build(folder).samples[3].image.caption
    read_names.clear()
    assert (plain, build(folder, "enable_wildcard = true\n").samples[3].image.caption) == (
        "first",
        "first\nsecond ねこ",
    )
    assert read_names == []


def test_captions_with_another_extension_have_their_own_table(folder, read_names):
    (folder / "p0.note").write_text("another")
    make_old(folder)
    other = CONFIG.replace(".txt", ".note")
    for _ in range(2):
        read_names.clear()
        build(folder)
        other_plan = plan_of(write_config(folder.parent / "note.toml", other))
        assert [sample.image.caption for sample in other_plan.samples][:2] == ["another", ""]
    assert read_names == []


def keep_times(path: Path, change: object) -> None:
    before = path.stat()
    assert callable(change)
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


EDITS = {
    "caption of the same size": lambda f: (f / "p0.txt").write_text("b tag 0"),
    "caption of another size, its time put back": lambda f: keep_times(
        f / "p0.txt", lambda: (f / "p0.txt").write_text("longer than before")
    ),
    "caption of the same size, its time put back": lambda f: keep_times(
        f / "p0.txt", lambda: (f / "p0.txt").write_text("c tag 0")
    ),
    "caption removed": lambda f: (f / "p1.txt").unlink(),
    "caption added": lambda f: (f / "wide.txt").write_text("new"),
    "picture replaced": lambda f: write_image(f / "p1.png", (64, 128)),
    "picture replaced, its time put back": lambda f: keep_times(
        f / "p1.png", lambda: write_image(f / "p1.png", (64, 128))
    ),
    "picture replaced by an older one": lambda f: (
        os.utime(write_image(f.parent / "old.png", (64, 128)), (LONG_AGO - 9, LONG_AGO - 9)),
        os.replace(f.parent / "old.png", f / "p1.png"),
    ),
    "picture renamed": lambda f: (f / "p2.png").rename(f / "zz.png"),
    "two images swapped": lambda f: (
        (f / "p2.png").rename(f / "x"),
        (f / "wide.png").rename(f / "p2.png"),
        (f / "x").rename(f / "wide.png"),
    ),
    "picture deleted": lambda f: (f / "p2.png").unlink(),
    "picture added": lambda f: write_image(f / "p9.png", (128, 64)),
    "picture of another kind added": lambda f: (f / "p9.gif").write_bytes(b"GIF89a"),
    "caption of no image added": lambda f: (f / "p9.txt").write_text("alone"),
    "folder in place of an image": lambda f: ((f / "p2.png").unlink(), (f / "p2.png").mkdir()),
    "link to nothing in place of an image": lambda f: ((f / "p2.png").unlink(), (f / "p2.png").symlink_to("gone")),
    "caption emptied": lambda f: (f / "p1.txt").write_text(""),
    "picture damaged": lambda f: (f / "p2.png").write_bytes(b""),
    "everything touched": lambda f: [path.touch() for path in f.glob("p*")],
    "index cut short": lambda f: spoil(f, lambda content: content[: len(content) // 2]),
    "index with one bit turned": lambda f: spoil(f, lambda c: c[:700] + bytes([c[700] ^ 1]) + c[701:]),
    "index of garbage": lambda f: spoil(f, lambda content: b"\x80garbage" * 99),
    "index empty": lambda f: spoil(f, lambda content: b""),
    "index gone": lambda f: (f / image_index.FILE_NAME).unlink(),
}


if os.name == "nt":  # Windows has no change time for files
    EDITS = {name: edit for name, edit in EDITS.items() if "time put back" not in name or "another size" in name}


def spoil(folder: Path, change: object) -> None:
    path = folder / image_index.FILE_NAME
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))


def give_all_captions(folder: Path) -> None:
    """Give every image a caption file, which allows checking the folder without listing it."""
    (folder / "wide.txt").write_text("one, two")
    make_old(folder)


def test_a_folder_with_a_complete_index_is_not_listed(folder, read_names, monkeypatch):
    give_all_captions(folder)
    first = fields_of(build(folder))
    read_names.clear()
    (folder / "p2.txt").write_text("another")
    assert fields_of(build(folder)) != first
    monkeypatch.setattr(scan, "list_files", None)
    build(folder)
    assert set(read_names) == {"p2.txt"}


@pytest.mark.parametrize("all_have_captions", [False, True])
@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_every_kind_of_edit_is_noticed(folder, edit, all_have_captions):
    if all_have_captions:
        give_all_captions(folder)
    before = fields_of(build(folder))
    edit(folder)
    after = fields_of(build(folder))
    assert after == fields_of(build_without_index(folder))
    assert fields_of(build(folder)) == after
    if edit not in (EDITS["everything touched"], *(EDITS[name] for name in EDITS if name.startswith("index"))):
        assert after != before


def test_only_edited_files_are_read_again(folder, read_names):
    build(folder)
    read_names.clear()
    (folder / "p0.txt").write_text("edited")
    build(folder)
    assert read_names == ["p0.txt"]


def test_a_recently_edited_file_is_read_again(folder, read_names):
    (folder / "p0.txt").touch()  # a second edit within one clock tick would keep the size and time
    build(folder)
    read_names.clear()
    build(folder)
    assert read_names == ["p0.txt"]


def test_a_damaged_index_is_rebuilt_with_a_warning(folder, caplog, read_names):
    build(folder)
    spoil(folder, lambda content: content[:100])
    build(folder)
    assert "cannot be used and is rebuilt" in caplog.text
    read_names.clear()
    build(folder)
    assert read_names == []


def test_an_index_of_another_version_is_rebuilt(folder, monkeypatch, read_names):
    monkeypatch.setattr(image_index, "VERSION", 0)
    build(folder)
    monkeypatch.undo()
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    build(folder)
    assert image_index.open_index(str(folder), IndexPlaces()).sizes.names


def test_a_read_only_folder_gets_no_index_and_no_error(folder):
    with unwritable(folder):
        build(folder)
    assert not (folder / image_index.FILE_NAME).exists()


def test_failing_to_write_the_index_is_not_an_error(folder, monkeypatch, caplog):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_file, "atomic_path", refuse)
    assert len(build(folder).samples) == 5
    assert not (folder / image_index.FILE_NAME).exists() and caplog.text.count("WARNING") == 0


def test_small_folders_get_no_index(tmp_path):
    build(write_folder(tmp_path / "pictures", 3))
    assert not list((tmp_path / "pictures").glob(".*"))


def test_images_listed_in_a_metadata_file_are_indexed_too(folder, read_names):
    (folder.parent / "meta.json").write_text('{"p1": {"caption": "x"}, "wide": {"caption": "y"}}')
    config = CONFIG.replace('caption_extension = ".txt"', 'metadata_file = "{here}/meta.json"')

    def read() -> ScannedSubset:
        return plan_of(write_config(folder.parent / "meta.toml", config)).datasets[0].subsets[0]

    first = read()
    assert [image.size for image in first.images] == [(64, 64), (128, 64)] and read_names == ["p1.png", "wide.png"]
    assert read() == first and len(read_names) == 2
    Image.new("RGB", (96, 64)).save(folder / "wide.png")
    assert read().images[1].size == (96, 64)


@pytest.mark.parametrize("is_slow", [False, True])
def test_parallel_reads_keep_the_order_and_raise_the_first_error(monkeypatch, is_slow):
    monkeypatch.setattr("library.data.decoding.threads.SLOW_READ_S", -1 if is_slow else 60)
    items = list(range(3 * BLOCK + 7))
    for num_threads in (4, 0):  # 0: a run without data loader workers
        assert read_many(lambda n: 2 * n, items, num_threads) == [2 * n for n in items]

    def fail(item):
        raise ValueError(item)

    with pytest.raises(ValueError, match=r"^0$"):
        read_many(fail, items, 4)


# Indexes lie with the caches if the user names a folder for these, or if the folder of the images is read-only.

SPEC = replace(builders.SPEC, max_references=1)
FOLDERS = ("photos", "before", "shards", "rows")
PLACES_CONFIG = """
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
    plan = plan_of(write_config(here / "data.toml", PLACES_CONFIG.format(key=key)).with_values(words), spec=SPEC)
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
