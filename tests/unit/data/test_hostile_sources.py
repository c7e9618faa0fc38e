"""Tar files, Parquet files, indexes and servers that are damaged, hostile or of another kind."""

import io
import logging
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from library.base.errors import UserError
from library.data.sources.storage import object_storage
from tests.unit.data.builders import batches_of, write_image
from tests.unit.data.shard_builders import open_subset, write_parquet, write_tar


def png(seed: int = 3) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (64, 64), (seed, 70, 90)).save(content, "PNG")
    return content.getvalue()


def tar_with_record(value: str, key: str = "size") -> bytes:
    """Return a tar file whose image has a PAX header with this record, unescaped."""
    record = f" {key}={value}\n".encode()
    length = len(record) + 1
    while len(str(length)) + len(record) != length:
        length += 1
    return tar_with_pax_header(str(length).encode() + record)


def tar_with_pax_header(records: bytes) -> bytes:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    image = tarfile.TarInfo("a.png")
    image.size = len(png())
    padded = [part + bytes(-len(part) % 512) for part in (records, png())]
    return header.tobuf() + padded[0] + image.tobuf() + padded[1] + bytes(1024)


def tar_with_negative_size() -> bytes:
    block = bytearray(tarfile.TarInfo("a.png").tobuf())
    block[124:136] = b"\xff" * 12  # -1 in base 256
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + bytes(2048)


TARS = {
    "negative size": (tar_with_negative_size(), r"0\.tar is damaged at byte 0: a size is negative"),
    "superscript": (tar_with_record("³"), r"0\.tar has a damaged header at byte 512"),
    "5,000 digits": (tar_with_record("9" * 5000), r"0\.tar has a damaged header at byte 512"),
    "length superscript": (tar_with_pax_header("³ path=x\n".encode()), r"0\.tar has a damaged header at byte 512"),
    "length 5,000 digits": (
        tar_with_pax_header(b"1" * 5000 + b" path=x\n"),
        r"0\.tar has a damaged header at byte 512",
    ),
    "login page": (b"<html>please log in</html>", r"0\.tar is not a tar file: it has 26 bytes"),
    "empty": (b"", r"0\.tar is not a tar file: it has 0 bytes"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = TARS[name]
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_subset(tmp_path, 'shards = "{here}/0.tar"')


@pytest.mark.skipif(os.name == "nt", reason="no such files")
def test_devices_and_pipes_are_refused_as_shards(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for path in ("/dev/zero", (tmp_path / "pipe.tar").as_posix()):
        with pytest.raises(UserError, match=r"(zero|pipe\.tar) is not a tar file: it has 0 bytes"):
            open_subset(tmp_path, f'shards = "{path}"')


def test_undecodable_and_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    names = ["caf\udce9.png", "red\x1b[31m.png"]
    members = [(name, png(place)) for place, name in enumerate(names)]
    write_tar(tmp_path / "0.tar", [*members, ("caf\udce9.txt", b"coffee")])
    plan = open_subset(tmp_path, 'shards = "{here}/0.tar"\nclass_tokens = "x"')
    images = plan.datasets[0].subsets[0].images
    shown = [(image.key.rpartition("/")[2], image.caption) for image in images]
    assert shown == [(r"caf\xe9.png", "coffee"), (r"red\x1b[31m.png", "x")]
    assert len(batches_of(plan)) == 1
    assert (
        len(open_subset(tmp_path, 'shards = "{here}/0.tar"').datasets[0].subsets[0].images) == 2
    )  # now read from the index


@pytest.mark.parametrize("key", ["shards", "image_dir", "parquet"])
def test_a_path_with_a_nul_character_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.toml has a NUL character in a text"):
        open_subset(tmp_path, f'{key} = "{{here}}/a\\u0000b"')


@pytest.mark.parametrize("pattern", ["{000000000..999999999}.tar", "{0..999}{0..999}{0..999}.tar"])
def test_an_oversized_pattern_is_refused_before_it_is_expanded(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lists 1000000000 files; the maximum is 1000000"):
        open_subset(tmp_path, f'shards = "{pattern}"')


def test_a_parquet_column_of_lists_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [[png()]], "caption": ["x"]})
    with pytest.raises(UserError, match=r"image_column 'image' .* has list<.*, but must have image bytes"):
        open_subset(tmp_path, 'parquet = "{here}/a.parquet"')


def test_a_parquet_table_without_bytes_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [{"bytes": [1, 2], "path": "x"}]})
    with pytest.raises(UserError, match=r"image_column 'image' .* has struct<.*, but must have image bytes"):
        open_subset(tmp_path, 'parquet = "{here}/a.parquet"')


def test_a_caption_of_megabytes_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [png()], "caption": ["x" * 2_000_000]})
    with pytest.raises(UserError, match=r"a\.parquet has a caption of 2\.0 MB"):
        open_subset(tmp_path, 'parquet = "{here}/a.parquet"')


@pytest.mark.nightly
def test_large_values_are_read_a_few_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Five values of 200 MB in a table are skipped, and the real image is used."""
    images = [{"bytes": bytes(200 << 20), "path": str(number)} for number in range(5)] + [{"bytes": png(), "path": "x"}]
    write_parquet(tmp_path / "a.parquet", {"image": images}, group=6)
    del images
    plan = open_subset(tmp_path, 'parquet = "{here}/a.parquet"\nclass_tokens = "x"')
    (subset,) = plan.datasets[0].subsets
    assert len(subset.images) == 1 and len(subset.dropped) == 5


def shards(folder: Path) -> str:
    for number in range(2):
        write_image(folder / f"{number}.png", (64, 64), number)
        write_tar(folder / f"{number}.tar", [(f"{number}.png", (folder / f"{number}.png").read_bytes())])
    return 'shards = "{here}/{0..1}.tar"\nclass_tokens = "x"'


INDEXES = {
    "file": [0, 7], "start": [-5, 512], "num_bytes": [10**12, 1], "width": [-64, 64], "height": [0, 64],
    "name": [None, "1.png"], "digest": [None, None],
}  # fmt: skip


@pytest.mark.parametrize("column", INDEXES)
def test_an_index_with_impossible_rows_is_rebuilt(
    column: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subset = shards(tmp_path)
    expected = [image.key for image in open_subset(tmp_path, subset).datasets[0].subsets[0].images]
    (path,) = tmp_path.glob(".picture_index-*.parquet")
    table = parquet.read_table(path)
    field = table.schema.field(column)
    values = pa.array(INDEXES[column], field.type)
    parquet.write_table(table.set_column(table.schema.get_field_index(column), field, values), path)
    with caplog.at_level(logging.WARNING):
        plan = open_subset(tmp_path, subset)
    assert [image.key for image in plan.datasets[0].subsets[0].images] == expected
    assert "is damaged and is rebuilt" in caplog.text and len(batches_of(plan)) == 1


def test_an_index_without_a_column_is_rebuilt(tmp_path: Path) -> None:
    subset = shards(tmp_path)
    open_subset(tmp_path, subset)
    (path,) = tmp_path.glob(".picture_index-*.parquet")
    table = parquet.read_table(path)
    parquet.write_table(table.drop_columns(["width"]), path)
    assert len(open_subset(tmp_path, subset).datasets[0].subsets[0].images) == 2


# HTTP


class Handler(BaseHTTPRequestHandler):
    """A handler that responds with the next of `statuses`, or with the content if none is left."""

    statuses: ClassVar[list[int]] = []
    content: ClassVar[bytes] = b""
    num_requests: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, has_body: bool) -> None:
        type(self).num_requests += 1
        status = self.statuses.pop(0) if self.statuses else 200
        first, last = 0, len(self.content) - 1
        if status == 200 and (byte_range := self.headers.get("Range")):
            first, last = (int(part) for part in byte_range.removeprefix("bytes=").split("-"))
            status = 206
        part = self.content[first : last + 1] if status in (200, 206) else b""
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(part)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        self.end_headers()
        if has_body:
            self.wfile.write(part)

    def log_message(self, *values: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Serve one tar file and return its URL."""
    monkeypatch.setattr(object_storage, "FIRST_WAIT_S", 0.001)
    write_tar(tmp_path / "made.tar", [("a.png", png()), ("a.txt", b"a cat")])
    Handler.statuses, Handler.num_requests = [], 0
    Handler.content = (tmp_path / "made.tar").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/0.tar"
    server.shutdown()
    server.server_close()


def open_url(tmp_path: Path, url: str):
    return open_subset(tmp_path, f'shards = "{url}"', "cache_dir", str(tmp_path / "caches"))


@pytest.mark.parametrize("status", [500, 503, 429])
def test_requests_to_a_server_that_fails_at_first_are_retried(
    status: int, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Handler.statuses = [status] * 4  # HEAD and GET of two attempts each
    with caplog.at_level(logging.WARNING):
        plan = open_url(tmp_path, address)
    assert [image.caption for image in plan.datasets[0].subsets[0].images] == ["a cat"]
    assert caplog.text.count(f"{status}") >= 2 and "trying again" in caplog.text


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, r"0\.tar cannot be read after 5 tries: 500"),
        (403, r"0\.tar cannot be read: 403.*check the address and the credentials"),
        (302, r"0\.tar cannot be read: .*check the address and the credentials"),
        (404, r"1 of 1 files are missing: .*0\.tar"),
    ],
)
def test_the_error_contains_the_reason_of_the_server(status: int, message: str, address: str, tmp_path: Path) -> None:
    Handler.statuses = [status] * 200
    with pytest.raises(UserError, match=message):
        open_url(tmp_path, address)
    if status != 500:
        assert Handler.num_requests < 25  # one attempt; a redirect is followed ten times


def test_a_login_page_in_place_of_a_tar_file_is_refused(address: str, tmp_path: Path) -> None:
    Handler.content = b"<html>please log in</html>"
    with pytest.raises(UserError, match=r"0\.tar is not a tar file: it has 26 bytes"):
        open_url(tmp_path, address)
