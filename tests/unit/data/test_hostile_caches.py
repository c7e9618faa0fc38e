"""Hostile files under the names of caches and captions: pipes, bombs, other kinds of files, left-overs of the dead."""

import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from library.data.decoding import npz
from library.errors import UserError
from tests.unit.data import test_text_cache as texts
from tests.unit.data.builders import options_of, plan_of, write_folder
from tests.unit.data.test_cache import cache, file_of, folder, latents_by_key  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_one_array(path: Path) -> None:
    """A .npy file, which numpy opens as an array and not as an archive."""
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").replace(path)


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MOST_BYTES", 1 << 24)


def put_bomb(path: Path) -> None:
    """A small file that unpacks to more than the limit: the directory alone tells."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("latents.npy", "w") as entry:
        entry.write(bytes(npz.MOST_BYTES + 1))
    assert path.stat().st_size < 1 << 16


SPOILED = [put_pipe, put_one_array, put_bomb]


@pytest.mark.parametrize("spoil", SPOILED)
def test_latents_are_made_anew(folder: Path, spoil, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    before = latents_by_key(cache(folder)[0])
    spoil(file_of(folder))
    plan, num_encoded = cache(folder)
    assert num_encoded == 1 and latents_by_key(plan) == before
    assert "1 damaged" in caplog.text


@pytest.mark.parametrize("spoil", SPOILED)
def test_encoded_captions_are_made_anew(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    first = texts.cache(texts.write_data(tmp_path))
    spoil(texts.file_of(tmp_path))
    again = texts.cache(tmp_path)
    assert len(again.encoded) < len(first.encoded) and again.num_loads == 1
    assert texts.cache(tmp_path).num_loads == 0


def test_a_pipe_in_the_place_of_an_image_is_no_image(tmp_path: Path) -> None:
    write_folder(tmp_path / "1_a", 2)
    put_pipe(tmp_path / "1_a/p0.png")
    assert plan_of(options_of("--resolution 64 --train_data_dir", str(tmp_path))).num_train_images == 1


@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_a_caption_file_that_is_none_is_named(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "1_a", 1)
    options = options_of("--resolution 64 --caption_extension .txt --train_data_dir", str(tmp_path))
    if kind == "pipe":
        put_pipe(tmp_path / "1_a/p0.txt")
        assert plan_of(options).num_train_images == 1
        return
    (tmp_path / "1_a/p0.txt").write_bytes(b"a, " * (1 << 20))
    with pytest.raises(UserError, match=r"p0\.txt has 3\.1 MB, too much for a caption"):
        plan_of(options)


def test_what_dead_processes_left_is_cleared_away_and_what_may_be_alive_stays(folder: Path) -> None:  # noqa: F811
    beside = folder / "2_a"
    old = [".p0_0064x0064_sd.0123456789ab.npz", ".p0_0064x0064_sd.npz.4711.tmp", "..latent_index.0123456789ab.npz"]
    young = [".p1_0064x0064_sd.0123456789ab.npz"]
    others = [".p2_notes.npz", "p3.0123456789ab.npz"]
    for name in (*old, *young, *others):
        (beside / name).write_bytes(b"half")
    for name in (*old, *others):
        os.utime(beside / name, (time.time() - 2 * npz.DEAD_AFTER_S,) * 2)
    cache(folder)
    left = {path.name for path in beside.iterdir()}
    assert not left & set(old)
    assert left >= {*young, *others}
