"""Images behind URLs: a real S3 server on loopback that cuts connections, answers late, and has lost objects."""

import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.data.caching.latents import cache_latents
from library.data.sources.indexed.rows import HEAD_BYTES
from library.data.sources.storage import object_storage
from library.data.sources.storage.disk_cache import DiskCache
from library.data.sources.storage.storage import REMOTE_CHUNK_BYTES, Storage
from library.errors import UserError
from library.options.caching import CachingOptions
from tests.unit.data.builders import averaging_vae, batches_of, content_of, write_image
from tests.unit.data.object_store import BUCKET, SECRET, ObjectStore, object_store
from tests.unit.data.shard_builders import open_subset, shards_of, write_parquet

pytestmark = pytest.mark.slow

COUNT = 10


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_storage, "FIRST_WAIT_S", 0.01)
        with object_store(patch) as found:
            yield found
    s3fs.S3FileSystem.clear_instance_cache()  # another server has another address


@pytest.fixture
def store(server: ObjectStore) -> ObjectStore:
    """The server with an empty bucket, which does nothing wrong."""
    server.reset()
    return server


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of 60 KB each, so that one is much more than what the index reads of it."""
    folder = tmp_path / "pictures"
    for i in range(COUNT):
        path = write_image(folder / f"p{i}.png", [(160, 128), (128, 160)][i % 2], seed=70 + i)
        path.with_suffix(".txt").write_text(f"word {i}")
    return folder


def open_remote(tmp_path: Path, subset: str, **options: object):
    values = {"cache_dir": str(tmp_path / "caches"), **options}
    return open_subset(tmp_path, subset, *[part for pair in values.items() for part in pair])


def contents(found, epoch: int = 1) -> list[object]:
    return [content_of(batch)[1:] for batch in batches_of(found, epoch)]


SHARDS = f'shards = "s3://{BUCKET}/cats/{{0..1}}.tar"\nshuffle_caption = true\nflip_aug = true\n'


@pytest.fixture
def shards(store: ObjectStore, images: Path, tmp_path: Path) -> ObjectStore:
    for number, path in enumerate(shards_of(images, tmp_path / "made", 2)):
        path.rename(path.with_name(f"{number}.tar"))
    store.fill(tmp_path / "made", "cats/")
    return store


def test_shards_of_a_bucket_train_as_the_folder_and_are_read_in_parts(
    shards: ObjectStore, images: Path, tmp_path: Path
) -> None:
    whole = sum(path.stat().st_size for path in (tmp_path / "made").iterdir())
    folder = f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\nshuffle_caption = true\nflip_aug = true\n'
    plain = open_subset(tmp_path, folder)
    found = open_remote(tmp_path, SHARDS)
    indexed = shards.num_bytes
    assert indexed < COUNT * 2 * REMOTE_CHUNK_BYTES < whole and all(one.range for one in shards.asked)
    shards.asked.clear()
    assert contents(found) == contents(plain)
    sizes = [path.stat().st_size for path in images.glob("*.png")]
    assert shards.num_bytes == sum(sizes) and len(shards.asked) == COUNT  # each image once, nothing else
    shards.asked.clear()
    assert contents(found, epoch=2) == contents(plain, epoch=2)
    assert contents(open_remote(tmp_path, SHARDS)) == contents(plain)  # another start: index and images are here
    assert shards.asked == []


def test_worker_processes_read_by_themselves(shards: ObjectStore, tmp_path: Path) -> None:
    """They are forked from a process that has talked to the server already."""
    found = open_remote(tmp_path, SHARDS)
    shards.asked.clear()
    from_workers = [content_of(batch)[1:] for batch in batches_of(found, workers=2)]
    assert len(shards.asked) == COUNT and contents(found) == from_workers and len(shards.asked) == COUNT


def test_the_index_reads_the_heads_of_images_and_not_their_middle(shards: ObjectStore, tmp_path: Path) -> None:
    open_remote(tmp_path, SHARDS)
    ranges = [tuple(map(int, one.range.removeprefix("bytes=").split("-"))) for one in shards.asked if one.range]
    assert max(last - first + 1 for first, last in ranges) <= REMOTE_CHUNK_BYTES > HEAD_BYTES


@pytest.mark.parametrize("kind", ["bytes", "urls", "public urls"])
def test_parquet_files_of_a_bucket_train_as_the_folder(
    kind: str, store: ObjectStore, images: Path, tmp_path: Path
) -> None:
    files = sorted(images.glob("*.png"))
    texts = [file.with_suffix(".txt").read_text() for file in files]
    if kind == "bytes":
        columns = {"image": [file.read_bytes() for file in files], "text": texts}
    else:
        store.fill(images, "loose/")
        base = f"s3://{BUCKET}" if kind == "urls" else f"{store.url}/{BUCKET}"
        query = "" if kind == "urls" else f"?token={SECRET}"
        columns = {"url": [f"{base}/loose/{file.name}{query}" for file in files], "text": texts}
    write_parquet(tmp_path / "made" / "rows.parquet", columns)
    store.fill(tmp_path / "made", "rows/")
    found = open_remote(tmp_path, f'parquet = "s3://{BUCKET}/rows/*.parquet"\n')
    plain = open_subset(tmp_path, f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\n')
    assert contents(found) == contents(plain)
    store.asked.clear()
    assert contents(found, 2) == contents(plain, 2) and store.asked == []
    assert not any(SECRET in sample.image.key for sample in found.samples)


def test_latents_of_remote_images_lie_under_the_cache_folder_and_images_are_not_asked_for_again(
    shards: ObjectStore, tmp_path: Path
) -> None:
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
    counts = []
    for _ in range(2):
        calls: list[int] = []
        cache_latents(open_remote(tmp_path, SHARDS), averaging_vae(calls), lambda: "vae", options, 1)
        counts.append(sum(calls))
        shards.asked.clear()
    assert counts == [2 * COUNT, 0]  # with their mirrored copies
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.npz")} == {"caches"}


def test_file_systems_that_wait_for_each_answer_serve_too(images: Path, tmp_path: Path) -> None:
    """fsspec has two kinds; s3:// and https:// are of the one, hf:// and this are of the other."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards_of(images, tmp_path / "made", 2):
        memory.pipe_file(f"/cats/{path.name}", path.read_bytes())
    plain = open_subset(tmp_path, f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\n')
    found = open_remote(tmp_path, 'shards = "memory://cats/*.tar"\n')
    assert found.samples[0].image.key == "memory:///cats/0000.tar/p0.png"
    assert contents(found) == contents(plain)
    memory.rm("/cats/0001.tar")
    again = open_remote(tmp_path, 'shards = "memory://cats/*.tar"\n')
    assert len(again.samples) == COUNT / 2


# Faults


def test_answers_that_are_cut_off_are_asked_for_again(shards: ObjectStore, images: Path, tmp_path: Path) -> None:
    plain = open_subset(tmp_path, f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\n')
    subset = f'shards = "s3://{BUCKET}/cats/{{0..1}}.tar"\n'
    shards.cuts = 2
    found = open_remote(tmp_path, subset)
    shards.cuts = 3
    assert contents(found) == contents(plain)
    ranges = [(one.key, one.range) for one in shards.asked]
    assert shards.cuts == 0 and len(ranges) - len(set(ranges)) >= 5


def test_a_server_that_stays_away_is_named_and_what_is_done_is_kept(
    shards: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards.statuses = ["503 Slow Down"] * 500
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/cats/\d\.tar cannot be read after 5 tries: .*check the netw"):
        open_remote(tmp_path, SHARDS)
    assert len([record for record in caplog.records if "trying again" in record.getMessage()]) >= 4
    shards.statuses = []
    assert len(open_remote(tmp_path, SHARDS).samples) == COUNT


def test_an_answer_that_takes_too_long_is_asked_for_again(
    shards: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = open_remote(tmp_path, SHARDS)
    monkeypatch.setattr(object_storage, "TIMEOUT_S", 0.3)
    shards.wait_s, shards.waits = 1.0, 1
    began = time.monotonic()
    place = found.samples[0].image.location
    assert place is not None and len(found.storage.read(place)) == place.num_bytes
    assert time.monotonic() - began < 0.95 and "trying again" in caplog.text


def test_objects_that_are_gone_are_named(shards: ObjectStore, tmp_path: Path) -> None:
    found = open_remote(tmp_path, SHARDS)
    shards.remove("cats/1.tar")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/cats/1\.tar no longer exists"):
        contents(found)
    with pytest.raises(UserError, match=rf"shards: 1 of 2 files are missing: s3://{BUCKET}/cats/1\.tar"):
        open_remote(tmp_path, SHARDS)


def test_a_shard_that_was_replaced_is_noticed(shards: ObjectStore, images: Path, tmp_path: Path) -> None:
    found = open_remote(tmp_path, SHARDS)
    for i in range(COUNT):
        write_image(images / f"p{i}.png", (160, 128), seed=900 + i)
    for number, path in enumerate(shards_of(images, tmp_path / "made", 2)):
        path.rename(path.with_name(f"{number}.tar"))
    shards.fill(tmp_path / "made", "cats/")
    with pytest.raises(UserError, match=r"was replaced since it was indexed|cannot be read after"):
        contents(found)
    assert len(contents(open_remote(tmp_path, SHARDS))) == COUNT / 2


def test_images_behind_dead_urls_are_left_out(store: ObjectStore, images: Path, tmp_path: Path) -> None:
    store.fill(images, "loose/")
    urls = [f"s3://{BUCKET}/loose/p0.png", f"s3://{BUCKET}/loose/none.png", None, f"s3://{BUCKET}/loose/p1.txt"]
    write_parquet(tmp_path / "rows.parquet", {"url": urls, "caption": ["a", "b", "c", "d"]})
    found = open_remote(tmp_path, 'parquet = "{here}/rows.parquet"\n')
    (subset,) = found.datasets[0].subsets
    assert [image.key for image in subset.images] == urls[:1]
    reasons = dict(subset.dropped)
    assert reasons[urls[1]] == "does not exist" and reasons["?"] == "has no URL" and "not an image" in reasons[urls[3]]


# Secrets


def test_no_secret_reaches_a_message_a_key_or_an_identity(
    shards: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    base = shards.url.replace("http://", f"http://me:{SECRET}@")
    found = open_remote(tmp_path, f'shards = "{base}/{BUCKET}/cats/{{0..1}}.tar?X-Amz-Signature={SECRET}"\n')
    found.audit(logging.getLogger("audit"))
    assert len(contents(found)) == COUNT / 2
    told = [str(found.identity_with_contents), str(found.facts()), *found.image_paths, caplog.text]
    told += [str(path) for path in (tmp_path / "caches").rglob("*")]
    shards.statuses = ["500 Broken"] * 500
    (tmp_path / "caches" / "read").rename(tmp_path / "gone")
    with pytest.raises(UserError) as caught:
        contents(found)
    told += [str(caught.value), caplog.text]
    assert f"{shards.url}/{BUCKET}/cats/" in told[-2] and "trying again" in told[-1]
    assert not [text for text in told if SECRET in text]
    index = next((tmp_path / "caches").rglob(".picture_index-*")).read_bytes()
    assert SECRET.encode() not in index


def test_wrong_keys_are_said_at_once(shards: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards.statuses = ["403 Forbidden"] * 50
    with pytest.raises(UserError, match=r"cats/\d\.tar cannot be read: .*check the address and the credentials"):
        open_remote(tmp_path, SHARDS)
    assert "trying again" not in caplog.text


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ('shards = "nosuch://bucket/x.tar"', r"nosuch://bucket/x\.tar: .*use s3://, hf://, https:// or a path"),
        ('shards = "oci://bucket/x.tar"', r"oci:// requires the package ocifs: python3 -m pip install ocifs"),
        (f'shards = "s3://{BUCKET}/none/*.tar"', r"matched no files"),
    ],
)
def test_urls_that_cannot_be_opened_say_why(subset: str, message: str, store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_remote(tmp_path, subset)


@pytest.mark.parametrize(("protocol", "package"), [("hf", "huggingface_hub"), ("s3", "s3fs")])
def test_a_package_that_is_missing_is_named(
    protocol: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=f"{protocol}:// requires the package {package}: python3 -m pip install {package}"
    ):
        open_remote(tmp_path, f'shards = "{protocol}://datasets/me/cats/x.tar"')


def test_remote_images_need_a_folder_for_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards at a URL require --cache_dir"):
        open_subset(tmp_path, f'shards = "s3://{BUCKET}/x.tar"')


# The disk cache


def test_the_disk_cache_keeps_its_size_and_what_was_used_last(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path / "read"), 10_000)
    for i in range(30):
        cache.put(f"picture {i}", bytes([i]) * 1000)
        os.utime(cache.path(f"picture {i}"), (i, i))
        if i:
            assert cache.get("picture 0") == bytes(1000) or i > 8
        os.utime(cache.path("picture 0"), (1000, 1000)) if cache.path("picture 0").exists() else None
    kept = [i for i in range(30) if cache.path(f"picture {i}").exists()]
    total = sum(path.stat().st_size for path in (tmp_path / "read").rglob("*") if path.is_file())
    assert total <= 10_000 + 1000 and kept[0] == 0 and kept[1:] == list(range(kept[1], 30)) and len(kept) >= 8
    cache.put("too large", b"x" * 10_001)
    assert cache.get("too large") is None


def test_a_damaged_file_of_the_disk_cache_is_read_again(shards: ObjectStore, tmp_path: Path) -> None:
    found = open_remote(tmp_path, SHARDS)
    expected = contents(found)
    for path in (tmp_path / "caches" / "read").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"!")
    shards.asked.clear()
    assert contents(found) == expected and len(shards.asked) == COUNT


def test_storage_travels_without_what_it_has_opened(shards: ObjectStore, tmp_path: Path) -> None:
    found = open_remote(tmp_path, SHARDS)
    contents(found)
    travelled = pickle.loads(pickle.dumps(found.storage))
    assert travelled == found.storage and travelled.opened.cache is None
    place = found.samples[3].image.location
    assert place is not None and travelled.read(place) == found.storage.read(place)
    assert isinstance(travelled, Storage)
