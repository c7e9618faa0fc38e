"""Tar shards and Parquet files train like the folder they were made from and are read in small parts."""

import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyarrow.parquet import read_table, write_table

from library.base.errors import UserError
from library.data.caching.latents import cache_latents
from library.data.sources import parquet, shards
from library.data.sources.indexed import parquet_index
from library.data.sources.indexed.parquet_files import KeptGroups
from library.data.sources.indexed.tar_files import Member, iterate_members
from library.data.sources.storage import storage
from library.data.sources.storage.ranges import Window
from library.data.sources.storage.storage import expand_pattern
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from tests.unit.data.builders import (
    averaging_vae,
    batches_of,
    content_of,
    plan_of,
    validation_of,
    write_config,
    write_image,
)
from tests.unit.data.shard_builders import DATASET, CountedReads, open_subset, shards_of, write_parquet, write_tar

RANDOM = "shuffle_caption = true\nflip_aug = true\nrandom_crop = true\ncolor_aug = true\n"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write eleven images of three shapes with captions of two lines."""
    folder = tmp_path / "pictures"
    for i in range(11):
        path = write_image(folder / f"p{i:02}.{'jpg' if i % 3 else 'png'}", [(64, 64), (100, 64), (64, 100)][i % 3], i)
        path.with_suffix(".txt").write_text(f"a cat, number {i}, sitting\nsecond line {i}", encoding="utf-8")
    return folder


def rows_of(images_column: list[bytes], folder: Path) -> dict[str, list[object]]:
    files = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
    return {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "caption": [file.with_suffix(".txt").read_text(encoding="utf-8") for file in files],
    }


def subset_of(kind: str, folder: Path, here: Path) -> str:
    """Write the images as a source of this kind and return the subset that reads it."""
    if kind == "folder":
        return f'image_dir = "{folder.as_posix()}"\ncaption_extension = ".txt"\n'
    if kind.startswith("tar"):
        shards_of(folder, here / "shards", 3, caption=kind.partition(" ")[2])
        return 'shards = "{here}/shards/{{0000..0002}}.tar"\n'.replace("{{", "{").replace("}}", "}")
    columns = rows_of([], folder)
    for number in range(2):
        part = slice(6 * number, 6 * number + 6)
        if kind == "parquet plain":
            images = [image["bytes"] for image in columns["image"][part]]  # type: ignore[index]
            content: dict[str, list[object]] = {"photo": images, "words": columns["caption"][part]}
        else:
            content = {name: column[part] for name, column in columns.items()}
        write_parquet(here / "rows" / f"{number}.parquet", content)
    named = 'image_column = "photo"\ncaption_column = "words"\n' if kind == "parquet plain" else ""
    return f'parquet = "{{here}}/rows/*.parquet"\n{named}'


KINDS = ["tar txt", "tar json", "parquet table", "parquet plain"]


def contents_without_names(plan) -> list[object]:
    """Return everything in two epochs except image names."""
    contents = [content_of(batch)[1:] for epoch in (1, 2) for batch in batches_of(plan, epoch)]
    return contents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wildcards", [False, True])
def test_shards_and_parquet_files_train_like_the_folder(
    kind: str, wildcards: bool, images: Path, tmp_path: Path
) -> None:
    settings = f"{RANDOM}num_repeats = 2\nenable_wildcard = {str(wildcards).lower()}\n"
    plain = open_subset(tmp_path, subset_of("folder", images, tmp_path) + settings)
    plan = open_subset(tmp_path, subset_of(kind, images, tmp_path) + settings)
    assert len(plan.samples) == 11
    assert contents_without_names(plan) == contents_without_names(plain)
    assert plan.num_batches == plain.num_batches


@pytest.mark.parametrize("kind", ["tar txt", "parquet table"])
def test_shards_and_parquet_files_are_split_like_the_folder(kind: str, images: Path, tmp_path: Path) -> None:
    settings = "validation_split = 0.3\nvalidation_seed = 7\n"
    splits = []
    for source in ("folder", kind):
        plan = open_subset(tmp_path, subset_of(source, images, tmp_path) + settings)
        validation = validation_of(plan)
        names = [validation.identify_images(i) for i in range(validation.num_batches)]
        captions = [batch.captions for batch in validation.batches(range(validation.num_batches), 0)]
        splits.append((names, captions, plan.num_train_images))
    assert splits[0] == splits[1] and splits[0][2] == 8


def latents_of(plan, folder: Path | None, **options: object) -> tuple[list[object], int]:
    calls: list[int] = []
    caching = CachingOptions(cache_latents=True, cache_latents_to_disk=folder is not None, vae_batch_size=3, **options)
    batches = open_batches(plan, cache_latents(plan, averaging_vae(calls), lambda: "vae", caching, 4))
    return [content_of(batch)[1:] for batch in batches_of(batches)], sum(calls)


@pytest.mark.parametrize("kind", ["tar txt", "parquet table"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_latents_of_shards_match_the_folder_and_are_cached(
    kind: str, elsewhere: bool, images: Path, tmp_path: Path
) -> None:
    expected, _ = latents_of(open_subset(tmp_path, subset_of("folder", images, tmp_path)), None)
    subset = subset_of(kind, images, tmp_path)
    place = {"cache_dir": str(tmp_path / "caches")} if elsewhere else {}
    first, num_first = latents_of(open_subset(tmp_path, subset, *sum(place.items(), ())), tmp_path)
    again, num_again = latents_of(open_subset(tmp_path, subset, *sum(place.items(), ())), tmp_path)
    assert first == again == expected and (num_first, num_again) == (11, 0)
    files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.npz")}
    beside = "shards" if kind.startswith("tar") else "rows"
    assert files == {"caches" if elsewhere else beside}


def test_only_an_image_replaced_in_a_shard_is_encoded_again(images: Path, tmp_path: Path) -> None:
    subset = subset_of("tar txt", images, tmp_path)
    latents_of(open_subset(tmp_path, subset), tmp_path)
    write_image(images / "p03.png", (64, 64), seed=99)
    shards_of(images, tmp_path / "shards", 3)
    assert latents_of(open_subset(tmp_path, subset), tmp_path)[1] == 1


def test_only_headers_and_first_bytes_are_indexed_and_images_read_one_by_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        write_image(images / f"large{i}.png", (300, 200), seed=50 + i)  # 180 KB each
    subset = subset_of("tar txt", images, tmp_path)
    counted = CountedReads(monkeypatch)
    plan = open_subset(tmp_path, subset)
    num_members = 17 + 11
    assert 0 < counted.num_bytes < num_members * 3 * 5120
    assert max(count for _, _, count in counted.reads) == 5120
    counted.reads.clear()
    assert len(open_subset(tmp_path, subset).samples) == 17 and counted.reads == []  # everything is in the index
    sample = next(sample for sample in plan.samples if sample.image.key.endswith("large3.png"))
    content = plan.storage.content(sample.image)
    assert content == (images / "large3.png").read_bytes()
    assert counted.num_bytes == len(content) and len(counted.reads) == 1


def test_reading_an_image_of_a_parquet_file_reads_at_most_one_row_group(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted(images.glob("p*.png")) + sorted(images.glob("p*.jpg")):
        write_image(path, (300, 200), seed=len(path.name))
    plan = open_subset(tmp_path, subset_of("parquet table", images, tmp_path))
    sizes = [(tmp_path / "rows" / f"{i}.parquet").stat().st_size for i in range(2)]
    counted = CountedReads(monkeypatch)
    place = plan.samples[7].image.location
    assert place is not None and plan.storage.read(place) == sorted(images.glob("p07.*"))[0].read_bytes()
    assert counted.num_bytes < 0.7 * sizes[1] + (1 << 16), "the end of the file and the first of its two groups"
    counted.reads.clear()
    assert plan.storage.read(plan.samples[8].image.location) and counted.reads == []  # in the same group


def test_row_groups_in_memory_are_limited_by_size(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        write_parquet(tmp_path / "rows" / f"{i}.parquet", rows_of([], images), group=4)
    monkeypatch.setattr(storage, "MOST_OPEN", 3)
    plan = open_subset(tmp_path, 'parquet = "{here}/rows/*.parquet"\n')
    opened = plan.storage.opened
    groups = plan.storage.shared(KeptGroups)
    groups.max_bytes = 150_000
    files = sorted(path for path in images.iterdir() if path.suffix != ".txt")
    for number in [0, 54, 20, 13, 40, 1, 54]:
        place = plan.samples[number].image.location
        assert place is not None and plan.storage.read(place) == files[number % 11].read_bytes()
        assert groups.num_bytes <= 150_000 and len(opened.files) <= 3
    assert groups.num_bytes > 50_000


def test_large_row_groups_are_warned_about_with_a_solution(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parquet, "MOST_GROUP_BYTES", 20_000)
    columns = rows_of([], images)
    write_parquet(tmp_path / "rows" / "0.parquet", columns, group=2)
    open_subset(tmp_path, 'parquet = "{here}/rows/*.parquet"\n')
    assert "make_shards" not in caplog.text
    write_parquet(tmp_path / "rows" / "1.parquet", columns, group=11)
    open_subset(tmp_path, 'parquet = "{here}/rows/*.parquet"\n')
    assert "1.parquet: reading one image reads 11 rows" in caplog.text and "make_shards.py" in caplog.text


def test_only_one_of_several_processes_builds_the_index(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = subset_of("tar txt", images, tmp_path)
    options = write_config(tmp_path / "data.toml", DATASET + subset)
    indexed: list[str] = []
    plain = shards.rows_of_tar

    def record_shard(window: Window, shown: str, rule: object) -> object:
        indexed.append(Path(shown).name)
        time.sleep(0.05)
        return plain(window, shown, rule)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "rows_of_tar", record_shard)
    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(lambda _: len(plan_of(options).samples), range(3)))
    assert counts == [11] * 3 and sorted(indexed) == ["0000.tar", "0001.tar", "0002.tar"]


def test_the_key_of_a_sample_names_its_shard_and_member(images: Path, tmp_path: Path) -> None:
    keys = [sample.image.key for sample in open_subset(tmp_path, subset_of("tar txt", images, tmp_path)).samples]
    assert keys[0] == f"{tmp_path.as_posix()}/shards/0000.tar/p00.png"
    assert keys[-1] == f"{tmp_path.as_posix()}/shards/0002.tar/p10.jpg"


# The index


def index_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(".picture_index-*"))


def test_only_shards_that_changed_are_indexed_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = subset_of("tar txt", images, tmp_path)
    open_subset(tmp_path, subset)
    (images / "p05.txt").write_text("another caption")
    again = shards_of(images, tmp_path / "again", 3)
    shutil.copy(again[1], tmp_path / "shards" / "0001.tar")
    counted = CountedReads(monkeypatch)
    plan = open_subset(tmp_path, subset)
    assert {name for name, _, _ in counted.reads} == {"0001.tar"}
    assert plan.samples[5].image.caption == "another caption" and len(plan.samples) == 11
    assert len(index_files(tmp_path / "shards")) == 1


def test_an_interrupted_index_is_resumed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subset = subset_of("tar txt", images, tmp_path)
    content = (tmp_path / "shards" / "0001.tar").read_bytes()
    (tmp_path / "shards" / "0001.tar").write_bytes(content[:4000])
    with pytest.raises(UserError, match=r"0001\.tar is truncated.*copy it again"):
        open_subset(tmp_path, subset)
    (tmp_path / "shards" / "0001.tar").write_bytes(content)
    counted = CountedReads(monkeypatch)
    assert len(open_subset(tmp_path, subset).samples) == 11
    assert "0000.tar" not in {name for name, _, _ in counted.reads}
    assert [path.suffix for path in index_files(tmp_path / "shards")] == [".parquet"]


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing PAR1", b"\0" * 300], ids=["empty", "marks", "zeros"])
def test_a_damaged_index_is_rebuilt(content: bytes, images: Path, tmp_path: Path) -> None:
    subset = subset_of("tar txt", images, tmp_path)
    expected = list(open_subset(tmp_path, subset).samples)
    (index,) = index_files(tmp_path / "shards")
    index.write_bytes(content)
    assert list(open_subset(tmp_path, subset).samples) == expected


def test_an_index_with_a_deeply_nested_record_is_rebuilt(images: Path, tmp_path: Path) -> None:
    """Python's JSON parser raises RecursionError for such a record."""
    subset = subset_of("tar txt", images, tmp_path)
    expected = list(open_subset(tmp_path, subset).samples)
    (index,) = index_files(tmp_path / "shards")
    table = read_table(index)
    record = table.schema.metadata | {parquet_index.ABOUT: b"[" * 100_000}
    write_table(table.replace_schema_metadata(record), index)
    assert list(open_subset(tmp_path, subset).samples) == expected


def test_a_dry_run_writes_no_index(images: Path, tmp_path: Path) -> None:
    options = write_config(tmp_path / "data.toml", DATASET + subset_of("tar txt", images, tmp_path))
    assert len(plan_of(options.with_values({"dry_run": True})).samples) == 11
    assert index_files(tmp_path / "shards") == []


def test_an_index_that_cannot_be_written_stays_in_memory(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").write_text("no folder")
    plan = open_subset(tmp_path, subset_of("tar txt", images, tmp_path), "cache_dir", str(tmp_path / "a file"))
    assert len(plan.samples) == 11 and "cannot be written, so every start rebuilds it" in caplog.text


def test_one_process_at_a_time_builds_an_index(tmp_path: Path) -> None:
    ends: list[str] = []

    def make_index(name: str, seconds: float) -> None:
        with parquet_index.index_lock(tmp_path / "index.parquet"):
            started.set()
            time.sleep(seconds)
            ends.append(name)

    started = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(make_index, "first", 0.3)
        started.wait()
        second = pool.submit(make_index, "second", 0)
        first.result(), second.result()
    assert ends == ["first", "second"] and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_keeps_the_index_in_memory(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def acquire(lock: object, **_: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    monkeypatch.setattr("filelock.FileLock.__enter__", acquire)
    plan = open_subset(tmp_path, subset_of("tar txt", images, tmp_path))
    assert len(plan.samples) == 11 and "every start rebuilds it (FileSystem does not appear" in caplog.text


def test_a_full_disk_is_reported_and_finished_work_is_kept(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = subset_of("tar txt", images, tmp_path)
    plain = parquet_index.atomic_path

    def fail_for_index(path: Path) -> object:
        if Path(path).name.startswith(".picture_index"):
            raise OSError(28, "No space left on device")
        return plain(path)

    monkeypatch.setattr(parquet_index, "atomic_path", fail_for_index)
    with pytest.raises(UserError, match=r"\.picture_index-.* cannot be written: No space left.*free space"):
        open_subset(tmp_path, subset)
    monkeypatch.undo()
    counted = CountedReads(monkeypatch)
    assert len(open_subset(tmp_path, subset).samples) == 11 and counted.reads == []


# Unusable images and sources


def png(size: tuple[int, int] = (64, 64), seed: int = 0) -> bytes:
    import io

    from PIL import Image

    target = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def test_unusable_images_are_skipped_with_the_reason(tmp_path: Path) -> None:
    members = [
        ("a.png", png()),
        ("a.txt", b"one"),
        ("a.jpg", png(seed=1)),
        ("b.png", b"no image"),
        ("b.txt", b"two"),
        ("empty.png", b""),
        ("c.png", png(seed=2)),
        ("d.mask.png", png(seed=3)),
        ("e.png", png(seed=4)),
        ("e.txt", b" \n"),
    ]
    write_tar(tmp_path / "x.tar", members)
    plan = open_subset(tmp_path, 'shards = "{here}/x.tar"\nclass_tokens = "thing"\n')
    (subset,) = plan.datasets[0].subsets
    assert [(p.key.rpartition("/")[2], p.caption) for p in subset.images] == [
        ("a.png", "one"),
        ("c.png", "thing"),
        ("e.png", ""),
    ]
    reasons = {key.rpartition("/")[2]: reason for key, reason in subset.dropped}
    assert reasons["a.jpg"] == "is skipped: a.png has the same name"
    assert set(reasons) == {"a.jpg", "b.png", "empty.png", "d.mask.png"} and "not an image" in reasons["b.png"]
    assert [key.rpartition("/")[2] for key in subset.without_caption] == ["c.png"]
    assert [key.rpartition("/")[2] for key in subset.empty_caption] == ["e.png"]


def test_replaced_images_that_a_parquet_file_names_by_path_are_noticed(tmp_path):
    """The index and the latents of the old image would be used, or the new file would be cut off."""
    for i in range(2):
        write_image(tmp_path / f"images/{i}.png", seed=i)
    write_parquet(tmp_path / "rows.parquet", {"url": ["images/0.png", "images/1.png"], "text": ["a", "b"]})
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
    calls: list[int] = []
    for seed, size in ((0, (64, 64)), (9, (80, 72))):
        write_image(tmp_path / "images/0.png", size, seed=seed)
        plan = open_subset(tmp_path, 'parquet = "{here}/rows.parquet"\n')
        assert [sample.image.size for sample in plan.samples] == [size, (64, 64)]
        assert sorted(caption for batch in batches_of(plan) for caption in batch.captions) == ["a", "b"]
        cache_latents(plan, averaging_vae(calls), lambda: "vae", options, 1)
    assert sum(calls) == 3, "only the replaced image is encoded again"


@pytest.mark.parametrize("has_cache_dir", [False, True])
def test_caches_of_images_that_a_parquet_file_names_do_not_depend_on_the_working_folder(
    tmp_path, monkeypatch, has_cache_dir
):
    path = write_image(tmp_path / "images/0.png")
    write_parquet(tmp_path / "rows.parquet", {"url": ["images/0.png"], "text": ["a"]})
    values = ("cache_dir", str(tmp_path / "caches")) if has_cache_dir else ()
    stems = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        plan = open_subset(tmp_path, 'parquet = "{here}/rows.parquet"\n', *values)
        stems.append(plan.storage.cache_stem(plan.samples[0].image))
    assert stems[0] == stems[1] and (has_cache_dir or stems[0] == str(path.with_suffix("")))


def test_images_with_a_dot_in_their_name_are_not_lost_silently(tmp_path):
    image = write_image(tmp_path / "p.png").read_bytes()
    names = ["a.png", "a.depth.png", "._a.png", "my.cat.01.jpg", "my.cat.01.txt"]
    write_tar(tmp_path / "x.tar", [(name, image if name.endswith("g") else b"a cat") for name in names])
    (subset,) = open_subset(tmp_path, 'shards = "{here}/x.tar"\n').datasets[0].subsets
    assert len(subset.images) == 1 and [Path(path).name for path, _ in subset.dropped] == ["my.cat.01.jpg"]
    assert "ends at its first dot; rename it" in subset.dropped[0][1]


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ('shards = "{here}/none-*.tar"', r"shards = .*none-\*\.tar' matched no files"),
        ('shards = "{here}/{0..3}.tar"', r"shards: 3 of 4 files are missing: .*/1\.tar"),
        ('shards = ["{here}/0.tar", "{here}/*.tar"]', r"lists a file twice: .*/0\.tar"),
        ('shards = "{here}/packed.tar.gz"', r"packed\.tar\.gz is compressed \(gzip\).*unpack it to \.tar"),
        ('shards = "{here}/text.tar"', r"text\.tar is not a tar file"),
        ('shards = "{here}/latin.tar"', r"latin\.tar/a\.txt is not UTF-8: byte 3"),
        ('shards = "{here}/json.tar"', r"json\.tar/a\.json is not valid JSON"),
        ('shards = "{here}/half.tar"', r"half\.tar/a\.json is not valid JSON: it contains half of a surrogate pair"),
        ('parquet = "{here}/text.tar"', r"text\.tar is not a Parquet file"),
        ('parquet = "{here}/other.parquet"', r"no image column with a usual name; set image_column, it has a, b"),
        ('parquet = "{here}/other.parquet"\nimage_column = "c"', r"image_column is 'c'.*no such column; it has a, b"),
        (
            'parquet = "{here}/other.parquet"\nimage_column = "a"',
            r"image_column 'a' .* has int64, but must have image bytes",
        ),
        ('shards = "{here}/0.tar"\nimage_dir = "{here}"', r"has image_dir and shards; each is a separate source"),
        (
            'shards = "{here}/0.tar"\ncache_info = true',
            r"\['cache_info'\] has no effect with shards; it is for image_dir",
        ),
        ('parquet = "x"\ncaption_extension = ".txt"', r"_extension'\] has no effect with parquet; .* and shards"),
        (
            'shards = "{here}/0.tar"\nimage_column = "a"',
            r"\['image_column'\] has no effect with shards.* for dataset_name and parquet",
        ),
        ("num_repeats = 2", r"\['image_dir'\] is missing: set a folder, or tar files as shards, or Parquet files"),
        ("shards = 3", r"\['shards'\] is 3, but must be text in quotes, or a list of such texts"),
    ],
)
def test_errors_for_unreadable_sources_say_why(subset: str, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", png())])
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "0.tar")
    (tmp_path / "text.tar").write_text("words " * 300)
    write_tar(tmp_path / "latin.tar", [("a.png", png()), ("a.txt", "caf\xe9".encode("latin-1"))])
    write_tar(tmp_path / "json.tar", [("a.png", png()), ("a.json", b"{'caption'")])
    write_tar(tmp_path / "half.tar", [("a.png", png()), ("a.json", b'{"caption": "\\ud800"}')])
    write_parquet(tmp_path / "other.parquet", {"a": [1], "b": ["x"]})
    with pytest.raises(UserError, match=message):
        open_subset(tmp_path, subset)


def test_a_shard_that_shrinks_during_the_run_is_refused_by_name(images: Path, tmp_path: Path) -> None:
    plan = open_subset(tmp_path, subset_of("tar txt", images, tmp_path))
    (tmp_path / "shards" / "0000.tar").write_bytes(b"\0" * 2000)
    with pytest.raises(UserError, match=r"0000\.tar ends at byte \d+, .*since it was indexed"):
        batches_of(plan)


def test_options_without_effect_are_warned_about(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_subset(tmp_path, subset_of("folder", images, tmp_path), "cache_dir", str(tmp_path / "caches"))
    assert "--cache_dir gets nothing but indexes" in caplog.text
    caplog.clear()
    shards = subset_of("tar txt", images, tmp_path)
    open_subset(tmp_path, shards, "cache_dir", str(tmp_path / "caches"))
    assert "--cache_dir" not in caplog.text


# Tar


def window_of(path: Path) -> Window:
    content = path.read_bytes()
    return Window(lambda start, count: content[start : start + count], len(content), 700)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_match_tarfile(form: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(form)
    long = "d" * 90 + "/" + ("n" * 90 if form == tarfile.USTAR_FORMAT else "n\xe9" * 90)
    names = ["a.jpg", "folder/b.seg.png", f"{long}.jpg", "empty.txt", "z.json"]
    members = [(name, rng.bytes(int(rng.integers(0, 3000)) if name != "empty.txt" else 0)) for name in names]
    path = write_tar(tmp_path / "x.tar", members, form)
    with tarfile.open(path, "a", format=form) as archive:
        folder = tarfile.TarInfo("a folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
    with tarfile.open(path) as archive:
        expected = [Member(info.name, info.offset_data, info.size) for info in archive if info.isfile()]
    assert list(iterate_members(window_of(path), "x")) == expected
    assert [member.stem for member in expected][:2] == ["a", "folder/b"] and expected[1].ending == "seg.png"


@pytest.mark.parametrize("place", [0, 100, 512, 1300])
def test_a_tar_file_with_a_flipped_bit_is_read_or_refused(place: int, tmp_path: Path) -> None:
    """A corrupt header raises nothing but UserError."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 700)], tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    for bit in range(0, 4096, 31):
        damaged = bytearray(content)
        damaged[(place + bit // 8) % len(content)] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            members = list(iterate_members(window_of(path), "x.tar"))
        except UserError as error:
            assert str(error).startswith("x.tar")
        else:
            assert all(member.start + member.num_bytes <= len(content) for member in members)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{a,bc}-{1..2}.tar", ["a-1.tar", "a-2.tar", "bc-1.tar", "bc-2.tar"]),
        ("{3..1}", []),
        ("{x}", ["{x}"]),
    ],
)
def test_braces_are_expanded_like_in_webdataset(pattern: str, expected: list[str]) -> None:
    assert expand_pattern(pattern) == expected


def test_the_identity_of_a_folder_has_not_changed(images: Path, tmp_path: Path) -> None:
    """Values from commit a16282a: states saved then must not report changed data."""
    plan = open_subset(tmp_path, subset_of("folder", images, tmp_path))
    assert plan.identity == {
        "num_pictures": 11,
        "num_batches": 6,
        "pictures": "876a5c64f10e86b86c8983e76d8d2a3e",
        "captions": "2596df8627a5850b71d5d55781e5971f",
        "settings": "ed157bfd1c1938d3a114bca2b64242e1",
    }
