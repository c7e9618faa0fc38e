"""Names that differ only in case: two files on Linux, one on Windows and macOS."""

import builtins
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from library.data.caching.captions import cache_texts
from library.data.caching.latents import cache_latents
from library.data.scanned.names import ignores_case, same_file_key
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from tests.unit.data.builders import batches_of, options_of, plan_of, write_config, write_folder, write_image
from tests.unit.data.test_audit import audit_log
from tests.unit.data.test_seen_references import encoding_of
from tests.unit.data.test_text_cache import DISK


@pytest.fixture
def ignoring_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a case-insensitive, case-preserving file system below tmp_path."""

    def find_actual_path(path: Any) -> Any:
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(f"{tmp_path}{os.sep}"):
            return path
        folder, name = os.path.split(os.fspath(path))
        names = os.listdir(folder) if os.access(folder, os.R_OK) else []
        other = next((entry for entry in names if entry.casefold() == name.casefold()), name)
        return os.path.join(folder, name if name in names else other)

    def resolve_argument(function: Any, place: int = 0) -> Any:
        return lambda *args, **named: function(
            *args[:place], find_actual_path(args[place]), *args[place + 1 :], **named
        )

    for module, name in ((os, "stat"), (os, "open"), (builtins, "open"), (io, "open"), (os, "replace")):
        place = 1 if name == "replace" else 0
        monkeypatch.setattr(module, name, resolve_argument(getattr(module, name), place))


def test_a_case_sensitive_folder_is_recognised(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "Cat.png")
    assert not ignores_case(str(tmp_path / "a")) and not ignores_case(str(tmp_path / "missing"))
    assert same_file_key(f"{tmp_path}/a/Cat.png") == f"{tmp_path}/a/Cat.png"


def test_a_case_insensitive_folder_is_recognised(tmp_path: Path, ignoring_case: None) -> None:
    write_image(tmp_path / "a" / "Cat.png")
    assert ignores_case(str(tmp_path / "a"))
    assert same_file_key(f"{tmp_path}/a/Cat.png") == same_file_key(f"{tmp_path}/a/cAT.png") == f"{tmp_path}/a/cat.png"


def audit_renamed_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Return the audit log for p0.TXT and P1.txt next to p0.png and p1.png."""
    write_folder(tmp_path / "a", 3, caption="words")
    for old, new in (("p0.txt", "p0.TXT"), ("p1.txt", "P1.txt")):
        (tmp_path / "a" / old).rename(tmp_path / "a" / new)
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\ncaption_extension = '.txt'\n"
    return audit_log(write_config(tmp_path / "data.toml", text), caplog)


def test_captions_in_another_case_are_reported_by_the_audit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = audit_renamed_captions(tmp_path, caplog)
    assert "1 of the missing captions exist as .TXT files" in log and "1 caption without an image: P1.txt" in log


def test_captions_in_another_case_are_read_on_a_case_insensitive_system(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ignoring_case: None
) -> None:
    assert "WARNING" not in audit_renamed_captions(tmp_path, caplog)


def test_images_whose_names_differ_in_case_do_not_share_a_cache(tmp_path: Path, ignoring_case: None) -> None:
    """Otherwise A.png and a.jpg would share a cache file, and both would use what the second wrote."""
    for name, seed in (("A.png", 1), ("a.jpg", 2)):
        write_image(tmp_path / "2_a" / name, seed=seed)
    (tmp_path / "2_a" / "a.txt").write_text("one, two, three, four, five, six")
    command = "--resolution 64 --caption_extension .txt --shuffle_caption"
    plan = plan_of(options_of(command, "--train_data_dir", str(tmp_path))).with_fixed_captions(3)
    encode = lambda pixels, _: torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)[:, :4]  # noqa: E731
    stores = []
    for to_disk in (False, True):
        latents = CachingOptions(cache_latents=True, cache_latents_to_disk=to_disk)
        store = cache_latents(plan, encode, lambda: "vae", latents, 1)
        texts = cache_texts(plan, encoding_of(DISK, []), (), False).store
        batches = [batch for epoch in (1, 2) for batch in batches_of(open_batches(plan, store, texts), epoch)]
        stores.append([(batch.keys, batch.latents_BCHW, batch.conditioning) for batch in batches])
    for in_memory, on_disk in zip(*stores, strict=True):
        assert in_memory[0] == on_disk[0] and torch.equal(in_memory[1], on_disk[1])
        assert all(torch.equal(in_memory[2][name], on_disk[2][name]) for name in in_memory[2])
    names = {path for path in os.listdir(tmp_path / "2_a") if path.endswith(".npz")}
    assert names == {"A_te.npz", ".empty_prompt_te.npz", "A_0064x0064_sd.npz"}
