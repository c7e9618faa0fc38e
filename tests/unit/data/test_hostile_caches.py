"""Hostile files in place of caches and captions: pipes, zip bombs, other formats, leftovers of killed processes."""

import os
import re
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from library.base.errors import UserError
from library.data.decoding import npz
from tests.unit.data import test_text_cache as texts
from tests.unit.data.builders import options_of, plan_of, write_folder
from tests.unit.data.test_cache import cache, file_of, folder, latents_by_key  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_npy(path: Path) -> None:
    """Replace a file by an .npy file, which NumPy opens as an array instead of an archive."""
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").replace(path)


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MOST_BYTES", 1 << 24)


def put_bomb(path: Path) -> None:
    """Replace a file by a small archive that unpacks to more than the limit, as its directory shows."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("latents.npy", "w") as entry:
        entry.write(bytes(npz.MOST_BYTES + 1))
    assert path.stat().st_size < 1 << 16


def put_claims(path: Path) -> None:
    """State shapes of terabytes in the headers of a cache's arrays."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, re.sub(rb"\((\d+)([^)]*)\), } {9}", rb"(\g<1>000000000\2), }", content))


def test_an_array_takes_no_more_memory_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, latents=np.zeros((4, 8, 8), np.float32), others=np.arange(6).reshape(2, 3).T)
    put_claims(path)
    tracemalloc.start()
    with npz.open_npz(path) as arrays, pytest.raises(ValueError, match=r"has the shape .4000000000, 8, 8. and 1024"):
        arrays["latents"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["f4", "f2", "u1", "i8", "bool", "U3"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_arrays_are_numpys(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", a=values, b=np.array(values, order="F"))
    with npz.open_npz(tmp_path / "a.npz") as arrays:
        assert list(arrays) == ["a", "b"] and len(arrays) == 2 and "c" not in arrays
        for name in arrays:
            read = arrays[name]
            assert (read.shape, read.dtype) == (values.shape, values.dtype) and np.array_equal(read, values)
            assert read.flags.writeable


@pytest.mark.parametrize("spoil", [put_pipe, put_bomb, put_claims])
def test_hostile_latent_files_are_encoded_again(folder: Path, spoil, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    before = latents_by_key(cache(folder)[0])
    spoil(file_of(folder))
    plan, num_encoded = cache(folder)
    assert num_encoded == 1 and latents_by_key(plan) == before
    assert "1 damaged" in caplog.text


@pytest.mark.parametrize("spoil", [put_npy, put_bomb])
def test_files_that_are_no_cache_are_refused_unread(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    first = texts.cache(texts.write_data(tmp_path))
    spoil(texts.file_of(tmp_path))
    with pytest.raises(UserError, match="not a cache of text features"):
        texts.cache(tmp_path)
    assert first.encoded


@pytest.mark.parametrize("spoil", [put_pipe, put_claims])
def test_hostile_text_cache_files_are_encoded_again(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    first = texts.cache(texts.write_data(tmp_path))
    spoil(texts.file_of(tmp_path))
    again = texts.cache(tmp_path)
    assert len(again.encoded) < len(first.encoded) and again.num_loads == 1
    assert texts.cache(tmp_path).num_loads == 0


def test_a_pipe_named_like_an_image_is_ignored(tmp_path: Path) -> None:
    write_folder(tmp_path / "1_a", 2)
    put_pipe(tmp_path / "1_a/p0.png")
    assert plan_of(options_of("--resolution 64 --train_data_dir", str(tmp_path))).num_train_images == 1


@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_a_pipe_as_caption_file_is_ignored_and_a_huge_one_refused(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "1_a", 1)
    options = options_of("--resolution 64 --caption_extension .txt --train_data_dir", str(tmp_path))
    if kind == "pipe":
        put_pipe(tmp_path / "1_a/p0.txt")
        assert plan_of(options).num_train_images == 1
        return
    (tmp_path / "1_a/p0.txt").write_bytes(b"a, " * (1 << 20))
    with pytest.raises(UserError, match=r"p0\.txt has 3\.1 MB, too much for a caption"):
        plan_of(options)


def test_old_temporary_files_are_removed_and_recent_ones_kept(folder: Path) -> None:  # noqa: F811
    images_folder = folder / "2_a"
    old = [".p0_0064x0064_sd.0123456789ab.npz", ".p0_0064x0064_sd.npz.4711.tmp", "..latent_index.0123456789ab.npz"]
    young = [".p1_0064x0064_sd.0123456789ab.npz"]
    others = [".p2_notes.npz", "p3.0123456789ab.npz"]
    for name in (*old, *young, *others):
        (images_folder / name).write_bytes(b"half")
    for name in (*old, *others):
        os.utime(images_folder / name, (time.time() - 2 * npz.DEAD_AFTER_S,) * 2)
    cache(folder)
    remaining = {path.name for path in images_folder.iterdir()}
    assert not remaining & set(old)
    assert remaining >= {*young, *others}
