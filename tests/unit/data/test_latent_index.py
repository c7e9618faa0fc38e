"""The index of latents saves opening cache files and never accepts a stale one."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.caching import latent_index
from library.data.decoding.npz import Verdict
from library.data.sources.folders import image_index
from tests.unit.data.test_cache import (
    cache,
    drop_latents,
    edit_image,
    file_of,
    flip_bits,
    folder,  # noqa: F401, a fixture
    latents_by_key,
    make_older_than_image,
    put_nan,
    put_other_crop,
    put_other_shape,
    put_other_size,
    rewrite,
    truncate,
)

TICK_S = 0.02  # longer than a clock tick of file timestamps


@pytest.fixture(autouse=True)
def checked_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the cache files opened for a check; count every folder as large and files as settled at once."""
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    monkeypatch.setattr(image_index, "SETTLED_NS", 0)
    names: list[str] = []
    judge = latent_index.judge

    def record_check(file, image, expected, storage) -> Verdict:
        names.append(os.path.basename(file.path))
        return judge(file, image, expected, storage)

    monkeypatch.setattr(latent_index, "judge", record_check)
    return names


def wait_a_tick() -> None:
    time.sleep(TICK_S)


def test_written_or_checked_entries_are_not_opened_again(folder, checked_files):  # noqa: F811
    first = latents_by_key(cache(folder)[0])
    wait_a_tick()
    checked_files.clear()
    plan, num_encoded = cache(folder)
    assert (num_encoded, checked_files) == (0, [])
    assert latents_by_key(plan) == first
    (folder / "2_a" / latent_index.FILE_NAME).unlink()
    assert cache(folder)[1] == 0 and len(checked_files) == 3
    checked_files.clear()
    assert cache(folder)[1] == 0 and checked_files == []


@pytest.mark.parametrize(
    "spoil",
    [
        edit_image,
        truncate,
        flip_bits,
        put_nan,
        put_other_shape,
        put_other_crop,
        put_other_size,
        drop_latents,
        make_older_than_image,
    ],
)
def test_an_entry_that_became_stale_is_noticed(folder, checked_files, spoil: Callable[[Path], None]):  # noqa: F811
    cache(folder)
    wait_a_tick()
    cache(folder)
    spoil(folder)
    wait_a_tick()
    checked_files.clear()
    assert cache(folder)[1] == 1
    assert checked_files == ["p0_0064x0064_sd.npz"]
    wait_a_tick()
    checked_files.clear()
    assert cache(folder)[1] == 0 and checked_files == []


@pytest.mark.parametrize(
    ("arguments", "vae"),
    [("", "another vae"), ("--resize_interpolation bicubic", "vae"), ("--flip_aug", "vae"), ("--alpha_mask", "vae")],
)
def test_changed_settings_invalidate_indexed_entries(folder, arguments, vae):  # noqa: F811
    cache(folder)
    wait_a_tick()
    assert cache(folder)[1] == 0
    assert cache(folder, arguments, vae=vae)[1] > 0


def test_caches_add_only_npz_files_to_image_folders(folder):  # noqa: F811
    """kohya-colab rejects folders with files other than images, captions and .npz."""
    cache(folder)
    wait_a_tick()
    cache(folder)
    names = {path.name for path in (folder / "2_a").iterdir()}
    assert {latent_index.FILE_NAME, image_index.FILE_NAME} <= names
    assert {Path(name).suffix for name in names} <= {".png", ".txt", ".npz"}


def test_entries_of_other_programs_are_still_recognised_from_the_index(folder, checked_files, caplog):  # noqa: F811
    cache(folder)
    wait_a_tick()
    for path in (folder / "2_a").glob("p*.npz"):
        rewrite(path)
    wait_a_tick()
    for _ in range(2):
        checked_files.clear()
        caplog.clear()
        caplog.set_level("INFO")
        assert cache(folder)[1] == 0
        assert "3 cache entries do not name their VAE" in caplog.text
    assert checked_files == []


def test_an_entry_replaced_by_another_run_is_checked(folder, checked_files, monkeypatch):  # noqa: F811
    note_written = latent_index.VerifiedEntries.note_written

    def replace_after_writing(self, file, image, origin) -> None:
        note_written(self, file, image, origin)
        wait_a_tick()
        if os.path.basename(file.path).startswith("p0"):
            rewrite(Path(file.path))

    monkeypatch.setattr(latent_index.VerifiedEntries, "note_written", replace_after_writing)
    cache(folder)
    wait_a_tick()
    checked_files.clear()
    cache(folder)
    assert checked_files == ["p0_0064x0064_sd.npz"]


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"PK\x03\x04" + bytes(99)])
def test_a_damaged_index_is_rebuilt(folder, checked_files, caplog, content):  # noqa: F811
    cache(folder)
    wait_a_tick()
    (folder / "2_a" / latent_index.FILE_NAME).write_bytes(content)
    checked_files.clear()
    assert cache(folder)[1] == 0 and len(checked_files) == 3
    assert "cannot be used and is rebuilt" in caplog.text
    checked_files.clear()
    assert cache(folder)[1] == 0 and checked_files == []


def test_entries_of_two_sizes_in_one_file_are_both_indexed(folder, checked_files):  # noqa: F811
    for _ in range(2):
        for arguments in ("", "--resolution 128,64"):
            cache(folder, arguments)
            wait_a_tick()
    checked_files.clear()
    for arguments in ("", "--resolution 128,64"):
        assert cache(folder, arguments)[1] == 0
    assert checked_files == []


def test_small_folders_and_unsettled_files_have_no_index(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(image_index, "MIN_FILES", 4)
    cache(folder)
    assert not list((folder / "2_a").glob(".*"))
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    monkeypatch.setattr(image_index, "SETTLED_NS", 10**12)
    cache(folder)
    cache(folder)
    assert not (folder / "2_a" / latent_index.FILE_NAME).exists()
    assert file_of(folder).exists()
