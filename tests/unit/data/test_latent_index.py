"""The index of latents saves opening cache files, and never lets a stale one pass."""

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
    edit_image,
    file_of,
    flip_bits,
    folder,  # noqa: F401, a fixture
    latents_by_key,
    lose_latents,
    make_it_older_than_the_image,
    put_nan,
    put_other_crop,
    put_other_shape,
    put_other_size,
    rewrite,
    truncate,
)

TICK_S = 0.02  # more than a tick of the clock that files get their times from


@pytest.fixture(autouse=True)
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cache files that are opened for a check. Every folder counts as large, files as settled at once."""
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    monkeypatch.setattr(image_index, "SETTLED_NS", 0)
    names: list[str] = []
    judge = latent_index.judge

    def judging(file, image, expected, storage) -> Verdict:
        names.append(os.path.basename(file.path))
        return judge(file, image, expected, storage)

    monkeypatch.setattr(latent_index, "judge", judging)
    return names


def resolve() -> None:
    time.sleep(TICK_S)


def test_entries_that_were_written_or_checked_are_not_opened_again(folder, judged):  # noqa: F811
    first = latents_by_key(cache(folder)[0])
    resolve()
    judged.clear()
    plan, num_encoded = cache(folder)
    assert (num_encoded, judged) == (0, [])
    assert latents_by_key(plan) == first
    (folder / "2_a" / latent_index.FILE_NAME).unlink()
    assert cache(folder)[1] == 0 and len(judged) == 3
    judged.clear()
    assert cache(folder)[1] == 0 and judged == []


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
        lose_latents,
        make_it_older_than_the_image,
    ],
)
def test_an_entry_that_is_not_true_any_more_is_noticed(folder, judged, spoil: Callable[[Path], None]):  # noqa: F811
    cache(folder)
    resolve()
    cache(folder)
    spoil(folder)
    resolve()
    judged.clear()
    assert cache(folder)[1] == 1
    assert judged == ["p0_0064x0064_sd.npz"]
    resolve()
    judged.clear()
    assert cache(folder)[1] == 0 and judged == []


@pytest.mark.parametrize(
    ("arguments", "vae"),
    [("", "another vae"), ("--resize_interpolation bicubic", "vae"), ("--flip_aug", "vae"), ("--alpha_mask", "vae")],
)
def test_other_settings_are_checked_anew(folder, arguments, vae):  # noqa: F811
    cache(folder)
    resolve()
    assert cache(folder)[1] == 0
    assert cache(folder, arguments, vae=vae)[1] > 0


def test_only_files_of_known_endings_lie_beside_images(folder):  # noqa: F811
    """kohya-colab trains no folder in which anything else lies than images, captions and .npz."""
    cache(folder)
    resolve()
    cache(folder)
    names = {path.name for path in (folder / "2_a").iterdir()}
    assert {latent_index.FILE_NAME, image_index.FILE_NAME} <= names
    assert {Path(name).suffix for name in names} <= {".png", ".txt", ".npz"}


def test_entries_of_other_programs_stay_known_as_such(folder, judged, caplog):  # noqa: F811
    cache(folder)
    resolve()
    for path in (folder / "2_a").glob("p*.npz"):
        rewrite(path)
    resolve()
    for _ in range(2):
        judged.clear()
        caplog.clear()
        caplog.set_level("INFO")
        assert cache(folder)[1] == 0
        assert "3 cache entries do not name their VAE" in caplog.text
    assert judged == []


def test_an_entry_that_another_run_replaced_meanwhile_is_checked(folder, judged, monkeypatch):  # noqa: F811
    note_written = latent_index.VerifiedEntries.note_written

    def replaced(self, file) -> None:
        note_written(self, file)
        resolve()
        if os.path.basename(file.path).startswith("p0"):
            rewrite(Path(file.path))

    monkeypatch.setattr(latent_index.VerifiedEntries, "note_written", replaced)
    cache(folder)
    resolve()
    judged.clear()
    cache(folder)
    assert judged == ["p0_0064x0064_sd.npz"]


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"PK\x03\x04" + bytes(99)])
def test_a_damaged_index_is_made_again(folder, judged, caplog, content):  # noqa: F811
    cache(folder)
    resolve()
    (folder / "2_a" / latent_index.FILE_NAME).write_bytes(content)
    judged.clear()
    assert cache(folder)[1] == 0 and len(judged) == 3
    assert "cannot be used and is rebuilt" in caplog.text
    judged.clear()
    assert cache(folder)[1] == 0 and judged == []


def test_entries_of_two_sizes_in_one_file(folder, judged):  # noqa: F811
    for _ in range(2):
        for arguments in ("", "--resolution 128,64"):
            cache(folder, arguments)
            resolve()
    judged.clear()
    for arguments in ("", "--resolution 128,64"):
        assert cache(folder, arguments)[1] == 0
    assert judged == []


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
