"""Images behind URLs, served by a local S3 server that cuts connections, responds late and loses objects."""

import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.data.caching.latents import cache_latents
from library.data.decoding.images import HEAD_BYTES
from library.data.sources.storage import object_storage
from library.data.sources.storage.disk_cache import DiskCache
from library.data.sources.storage.storage import REMOTE_CHUNK_BYTES, Storage
from library.data.training_data import open_batches
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
        with object_store(patch) as object_server:
            yield object_server
    s3fs.S3FileSystem.clear_instance_cache()  # later servers have other addresses


@pytest.fixture
def store(server: ObjectStore) -> ObjectStore:
    """Return the server with an empty bucket and no simulated faults."""
    server.reset()
    return server


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write images of 60 KB each, much larger than the part that the index reads."""
    folder = tmp_path / "pictures"
    for i in range(COUNT):
        path = write_image(folder / f"p{i}.png", [(160, 128), (128, 160)][i % 2], seed=70 + i)
        path.with_suffix(".txt").write_text(f"word {i}")
    return folder


def open_remote(tmp_path: Path, subset: str, **options: object):
    values = {"cache_dir": str(tmp_path / "caches"), **options}
    return open_subset(tmp_path, subset, *[part for pair in values.items() for part in pair])


def contents(plan, epoch: int = 1) -> list[object]:
    return [content_of(batch)[1:] for batch in batches_of(plan, epoch)]


SHARDS = f'shards = "s3://{BUCKET}/cats/{{0..1}}.tar"\nshuffle_caption = true\nflip_aug = true\n'


@pytest.fixture
def shards(store: ObjectStore, images: Path, tmp_path: Path) -> ObjectStore:
    for number, path in enumerate(shards_of(images, tmp_path / "made", 2)):
        path.rename(path.with_name(f"{number}.tar"))
    store.fill(tmp_path / "made", "cats/")
    return store


def test_shards_of_a_bucket_train_like_the_folder_and_are_read_in_parts(
    shards: ObjectStore, images: Path, tmp_path: Path
) -> None:
    total_bytes = sum(path.stat().st_size for path in (tmp_path / "made").iterdir())
    folder = f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\nshuffle_caption = true\nflip_aug = true\n'
    plain = open_subset(tmp_path, folder)
    plan = open_remote(tmp_path, SHARDS)
    indexed = shards.num_bytes
    assert indexed < COUNT * 2 * REMOTE_CHUNK_BYTES < total_bytes and all(request.range for request in shards.requests)
    shards.requests.clear()
    assert contents(plan) == contents(plain)
    sizes = [path.stat().st_size for path in images.glob("*.png")]
    assert shards.num_bytes == sum(sizes) and len(shards.requests) == COUNT  # each image once, nothing else
    shards.requests.clear()
    assert contents(plan, epoch=2) == contents(plain, epoch=2)
    assert contents(open_remote(tmp_path, SHARDS)) == contents(
        plain
    )  # a second start finds the index and images in the cache
    assert shards.requests == []


def test_worker_processes_read_from_the_server(shards: ObjectStore, tmp_path: Path) -> None:
    """Workers are forked from a process that already has a connection to the server."""
    plan = open_remote(tmp_path, SHARDS)
    shards.requests.clear()
    from_workers = [content_of(batch)[1:] for batch in batches_of(plan, workers=2)]
    assert len(shards.requests) == COUNT and contents(plan) == from_workers and len(shards.requests) == COUNT


def test_the_index_reads_only_the_first_bytes_of_images(shards: ObjectStore, tmp_path: Path) -> None:
    open_remote(tmp_path, SHARDS)
    ranges = [
        tuple(map(int, request.range.removeprefix("bytes=").split("-"))) for request in shards.requests if request.range
    ]
    assert max(last - first + 1 for first, last in ranges) <= REMOTE_CHUNK_BYTES > HEAD_BYTES


@pytest.mark.parametrize("kind", ["bytes", "urls", "public urls"])
def test_parquet_files_of_a_bucket_train_like_the_folder(
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
    plan = open_remote(tmp_path, f'parquet = "s3://{BUCKET}/rows/*.parquet"\n')
    plain = open_subset(tmp_path, f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\n')
    assert contents(plan) == contents(plain)
    store.requests.clear()
    assert contents(plan, 2) == contents(plain, 2) and store.requests == []
    assert not any(SECRET in sample.image.key for sample in plan.samples)


def test_latents_of_remote_images_are_cached_and_images_not_requested_again(
    shards: ObjectStore, tmp_path: Path
) -> None:
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
    counts = []
    for _ in range(2):
        calls: list[int] = []
        cache_latents(open_remote(tmp_path, SHARDS), averaging_vae(calls), lambda: "vae", options, 1)
        counts.append(sum(calls))
        shards.requests.clear()
    assert counts == [2 * COUNT, 0]  # with their mirrored copies
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.npz")} == {"caches"}


def test_synchronous_file_systems_work_too(images: Path, tmp_path: Path) -> None:
    """fsspec has asynchronous file systems (s3://, https://) and synchronous ones (hf://, memory://)."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards_of(images, tmp_path / "made", 2):
        memory.pipe_file(f"/cats/{path.name}", path.read_bytes())
    plain = open_subset(tmp_path, f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\n')
    plan = open_remote(tmp_path, 'shards = "memory://cats/*.tar"\n')
    assert plan.samples[0].image.key == "memory:///cats/0000.tar/p0.png"
    assert contents(plan) == contents(plain)
    memory.rm("/cats/0001.tar")
    again = open_remote(tmp_path, 'shards = "memory://cats/*.tar"\n')
    assert len(again.samples) == COUNT / 2


# Faults


def test_truncated_responses_are_requested_again(shards: ObjectStore, images: Path, tmp_path: Path) -> None:
    plain = open_subset(tmp_path, f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"\n')
    subset = f'shards = "s3://{BUCKET}/cats/{{0..1}}.tar"\n'
    shards.cuts = 2
    plan = open_remote(tmp_path, subset)
    shards.cuts = 3
    assert contents(plan) == contents(plain)
    ranges = [(request.key, request.range) for request in shards.requests]
    assert shards.cuts == 0 and len(ranges) - len(set(ranges)) >= 5


def test_an_unavailable_server_is_named_and_finished_work_is_kept(
    shards: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards.statuses = ["503 Slow Down"] * 500
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/cats/\d\.tar cannot be read after 5 tries: .*check the netw"):
        open_remote(tmp_path, SHARDS)
    assert len([record for record in caplog.records if "trying again" in record.getMessage()]) >= 4
    shards.statuses = []
    assert len(open_remote(tmp_path, SHARDS).samples) == COUNT


def test_a_request_that_times_out_is_repeated(
    shards: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = open_remote(tmp_path, SHARDS)
    monkeypatch.setattr(object_storage, "TIMEOUT_S", 0.3)
    shards.wait_s, shards.waits = 1.0, 1
    start = time.monotonic()
    location = plan.samples[0].image.location
    assert location is not None and len(plan.storage.read(location)) == location.num_bytes
    assert time.monotonic() - start < 0.95 and "trying again" in caplog.text


def test_missing_objects_are_named(shards: ObjectStore, tmp_path: Path) -> None:
    plan = open_remote(tmp_path, SHARDS)
    shards.remove("cats/1.tar")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/cats/1\.tar no longer exists"):
        contents(plan)
    with pytest.raises(UserError, match=rf"shards: 1 of 2 files are missing: s3://{BUCKET}/cats/1\.tar"):
        open_remote(tmp_path, SHARDS)


def test_a_shard_that_was_replaced_is_noticed(shards: ObjectStore, images: Path, tmp_path: Path) -> None:
    plan = open_remote(tmp_path, SHARDS)
    for i in range(COUNT):
        write_image(images / f"p{i}.png", (160, 128), seed=900 + i)
    for number, path in enumerate(shards_of(images, tmp_path / "made", 2)):
        path.rename(path.with_name(f"{number}.tar"))
    shards.fill(tmp_path / "made", "cats/")
    with pytest.raises(UserError, match=r"was replaced since it was indexed|cannot be read after"):
        contents(plan)
    assert len(contents(open_remote(tmp_path, SHARDS))) == COUNT / 2


@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_urls_that_differ_only_in_their_parameters_are_different_images(to_disk: bool, tmp_path: Path) -> None:
    """The parameters are left out of names, but images of one name would share their latents."""
    import fsspec

    urls = [f"memory://pictures/image?id={i}" for i in range(3)]
    for i, url in enumerate(urls):
        fsspec.filesystem("memory").pipe(url, write_image(tmp_path / "image.png", seed=i).read_bytes())
    write_parquet(tmp_path / "rows.parquet", {"url": urls, "text": ["a", "b", "c"]})
    plan = open_remote(tmp_path, 'parquet = "{here}/rows.parquet"\n')
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=to_disk)
    cached = open_batches(plan, cache_latents(plan, averaging_vae(), lambda: "vae", options, 1))
    for plain, stored in zip(batches_of(plan), batches_of(cached), strict=True):
        assert (stored.latents_BCHW - averaging_vae()(plain.pixels_BCHW, None)).abs().max() < 0.1
    assert len(set(plan.image_paths)) == 3


def test_shards_that_differ_only_in_their_parameters_are_refused(tmp_path: Path) -> None:
    subset = 'shards = ["https://host/get?file=0.tar", "https://host/get?file=1.tar"]'
    with pytest.raises(UserError, match=r"differ only in their parameters.*https://host/get; use addresses with"):
        open_remote(tmp_path, subset)


def test_images_behind_dead_urls_are_skipped(store: ObjectStore, images: Path, tmp_path: Path) -> None:
    store.fill(images, "loose/")
    urls = [f"s3://{BUCKET}/loose/p0.png", f"s3://{BUCKET}/loose/none.png", None, f"s3://{BUCKET}/loose/p1.txt"]
    write_parquet(tmp_path / "rows.parquet", {"url": urls, "caption": ["a", "b", "c", "d"]})
    plan = open_remote(tmp_path, 'parquet = "{here}/rows.parquet"\n')
    (subset,) = plan.datasets[0].subsets
    assert [image.key for image in subset.images] == urls[:1]
    reasons = dict(subset.dropped)
    assert reasons[urls[1]] == "does not exist" and reasons["?"] == "has no URL" and "not an image" in reasons[urls[3]]


# Secrets


def test_no_secret_reaches_a_message_a_key_or_an_identity(
    shards: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    base = shards.url.replace("http://", f"http://me:{SECRET}@")
    plan = open_remote(tmp_path, f'shards = "{base}/{BUCKET}/cats/{{0..1}}.tar?X-Amz-Signature={SECRET}"\n')
    plan.audit(logging.getLogger("audit"))
    assert len(contents(plan)) == COUNT / 2
    texts = [str(plan.identity_with_contents), str(plan.audit_values()), *plan.image_paths, caplog.text]
    texts += [str(path) for path in (tmp_path / "caches").rglob("*")]
    shards.statuses = ["500 Broken"] * 500
    (tmp_path / "caches" / "read").rename(tmp_path / "gone")
    with pytest.raises(UserError) as caught:
        contents(plan)
    texts += [str(caught.value), caplog.text]
    assert f"{shards.url}/{BUCKET}/cats/" in texts[-2] and "trying again" in texts[-1]
    assert not [text for text in texts if SECRET in text]
    index = next((tmp_path / "caches").rglob(".picture_index-*")).read_bytes()
    assert SECRET.encode() not in index


def test_wrong_credentials_are_reported_without_retries(
    shards: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards.statuses = ["403 Forbidden"] * 50
    with pytest.raises(UserError, match=r"cats/\d\.tar cannot be read: .*check the address and the credentials"):
        open_remote(tmp_path, SHARDS)
    assert "trying again" not in caplog.text


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ('shards = "nosuch://bucket/x.tar"', r"nosuch://bucket/x\.tar: .*use s3://, hf://, https:// or a path"),
        ('shards = "oci://bucket/x.tar"', r"oci:// needs the package ocifs, which is not installed: pip install ocifs"),
        (f'shards = "s3://{BUCKET}/none/*.tar"', r"matched no files"),
    ],
)
def test_errors_for_urls_that_cannot_be_opened_say_why(
    subset: str, message: str, store: ObjectStore, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_remote(tmp_path, subset)


@pytest.mark.parametrize(("protocol", "package"), [("hf", "huggingface-hub"), ("s3", "s3fs")])
def test_the_error_for_a_missing_package_names_it(
    protocol: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(
        UserError, match=f"^{protocol}:// needs the package {package}, which is not installed: pip install {package}"
    ):
        open_remote(tmp_path, f'shards = "{protocol}://datasets/me/cats/x.tar"')


def test_remote_images_require_cache_dir(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards at a URL require --cache_dir"):
        open_subset(tmp_path, f'shards = "s3://{BUCKET}/x.tar"')


# The disk cache


def test_the_disk_cache_keeps_its_size_limit_and_the_most_recent_files(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path / "read"), 10_000)
    for i in range(30):
        cache.put(f"picture {i}", bytes([i]) * 1000)
        os.utime(cache.path(f"picture {i}"), (i, i))
        if i:
            assert cache.get("picture 0") == bytes(1000) or i > 8
        os.utime(cache.path("picture 0"), (1000, 1000)) if cache.path("picture 0").exists() else None
    remaining = [i for i in range(30) if cache.path(f"picture {i}").exists()]
    total = sum(path.stat().st_size for path in (tmp_path / "read").rglob("*") if path.is_file())
    assert (
        total <= 10_000 + 1000
        and remaining[0] == 0
        and remaining[1:] == list(range(remaining[1], 30))
        and len(remaining) >= 8
    )
    cache.put("too large", b"x" * 10_001)
    assert cache.get("too large") is None


def test_a_damaged_file_of_the_disk_cache_is_read_again(shards: ObjectStore, tmp_path: Path) -> None:
    plan = open_remote(tmp_path, SHARDS)
    expected = contents(plan)
    for path in (tmp_path / "caches" / "read").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"!")
    shards.requests.clear()
    assert contents(plan) == expected and len(shards.requests) == COUNT


def test_storage_is_pickled_without_its_open_files(shards: ObjectStore, tmp_path: Path) -> None:
    plan = open_remote(tmp_path, SHARDS)
    contents(plan)
    unpickled = pickle.loads(pickle.dumps(plan.storage))
    assert unpickled == plan.storage and unpickled.opened.cache is None
    location = plan.samples[3].image.location
    assert location is not None and unpickled.read(location) == plan.storage.read(location)
    assert isinstance(unpickled, Storage)
