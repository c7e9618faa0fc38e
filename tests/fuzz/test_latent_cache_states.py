"""The latent cache as a state machine: whatever happens to images, files, settings and runs, no latent is stale, no
entry is encoded without need, and no file is lost."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from PIL import Image
from torch import Tensor

from library.base.errors import UserError
from library.data.caching.latents import cache_latents
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.processes.process_group import ALONE, Processes
from tests.fuzz.budget import Step, any_walk, walk
from tests.unit.data.builders import SPEC, batches_of, options_of, plan_of
from tests.unit.test_processes import Board

DISK, MEMORY = (CachingOptions(cache_latents=True, cache_latents_to_disk=on, vae_batch_size=2) for on in (True, False))
RGBA = replace(SPEC, has_alpha=True, cache_suffix="_rgba.npz")
FLAGS = ("--flip_aug", "--alpha_mask", "--resize_interpolation bicubic")
FIRST_TIME = 1_600_000_000
places = st.integers(0, 5)


@dataclass(frozen=True)
class Entry:
    """Hold the content that an entry of the cache was made from, and its extras."""

    source: tuple[str, str, str, str]  # image, its digest, VAE, filter
    extras: frozenset[str] = frozenset()
    foreign: tuple[int, Any] | None = None  # the time and latents of an entry of another program, which has no note


def vae(name: str, calls: list[int], before: Callable[[], None] = lambda: None) -> Callable[..., Tensor]:
    """Return an encoder of mean colours and opacity, moved by a value of its own."""

    def encode(pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        before()
        calls.append(len(pixels_BCHW))
        padded_BCHW = torch.cat([pixels_BCHW, torch.zeros_like(pixels_BCHW[:, :1])], 1)[:, :4]
        return torch.nn.functional.avg_pool2d(padded_BCHW, 8) + len(name)

    return encode


def stop_at(number: int, error: BaseException) -> Callable[..., None]:
    """Return a function that raises an error when it is called for the `number`-th time, from 0."""
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == number + 1:
            raise error

    return count


def change_arrays(path: Path, keeps_notes: bool, **changes: Any) -> None:
    """Rewrite a file as another program would: an array becomes `changes[name](array)`, or goes if that is None."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if keeps_notes or not name.startswith("origin_")}
    for name in list(arrays):
        change = changes.get(re.sub(r"_\d+x\d+$", "", name), lambda array: array)
        if (array := change(arrays.pop(name))) is not None:
            arrays[name] = array
    np.savez(path, **arrays)


def damage(path: Path, keep: slice, flips: slice = slice(0, 0)) -> None:
    content = bytearray(path.read_bytes())
    content[flips] = bytes(255 - byte for byte in content[flips])
    path.write_bytes(content[keep])


SPOILERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (lambda path: damage(path, slice(700)), "damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)) and None, "damaged"),
    "flipped bits": (lambda path: damage(path, slice(None), slice(400, 404)), "damaged"),
    "NaN": (lambda path: change_arrays(path, False, latents=lambda a: a * np.float32("nan")), "holding NaN"),
    "whole numbers": (lambda path: change_arrays(path, False, latents=lambda a: a.astype(int)), "of the type int64"),
    "text": (lambda path: change_arrays(path, False, latents=lambda a: a.astype(str)), "of the type <U"),
    "other shape": (lambda path: change_arrays(path, False, latents=lambda a: a[:, :5]), r"latents of shape \(4, 5"),
    "other crop": (lambda path: change_arrays(path, False, crop_ltrb=lambda a: a + 1), "for another size or crop"),
    "other size": (lambda path: change_arrays(path, False, original_size=lambda a: a + 1), "for another size or crop"),
    "complex": (lambda path: change_arrays(path, False, original_size=lambda a: a + 1j), "for another size or crop"),
    "no latents": (lambda path: change_arrays(path, True, latents=lambda a: None), "without latents of this size"),
    "older": (lambda path: change_arrays(path, False) or os.utime(path, (1, 1)), "older than the image"),
}  # fmt: skip


class LatentCacheStates(RuleBasedStateMachine):
    """Images, cache files and settings, and what every entry must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="latents-"))
        self.folder = self.root / "1_a"
        self.folder.mkdir()
        self.spec, self.vae, self.width, self.flags = SPEC, "vae", 64, frozenset[str]()
        self.entries: dict[tuple[str, str], Entry] = {}  # by file name and suffix of the keys
        self.edited: dict[str, int] = {}  # the time of each image
        self.num_made = self.gathered = 0
        self.is_certain = True  # False after a run that was stopped
        self.log: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("library.data.caching.filling").addHandler(self.handler)
        for form in ("png", "bmp", "png"):
            self.add(form)
        self.check()

    def teardown(self) -> None:
        try:
            self.check()
        finally:
            logging.getLogger("library.data.caching.filling").removeHandler(self.handler)
            shutil.rmtree(self.root)

    # Images

    def now(self) -> int:
        """Return a later time for every file, because file systems may give two edits the same."""
        self.num_made += 1
        return FIRST_TIME + self.num_made

    def image(self, place: int) -> Path:
        images = sorted(path for path in self.folder.iterdir() if path.suffix in (".png", ".bmp"))
        return images[place % len(images)]

    def paint(self, path: Path, size: tuple[int, int], time: int) -> None:
        mode = "RGBA" if path.suffix == ".png" else "RGB"
        shape = (size[1], size[0], len(mode))
        pixels = np.random.default_rng(self.num_made).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode=mode).save(path)
        os.utime(path, (time, time))
        self.edited[path.name] = time

    @rule(form=st.sampled_from(["png", "bmp"]))
    def add(self, form: str) -> None:
        time = self.now()
        self.paint(self.folder / f"p{self.num_made:03d}.{form}", (64, 64), time)

    @rule(place=places, keeps_time=st.booleans())
    def edit(self, place: int, keeps_time: bool) -> None:
        """Only an image that is not compressed can have other content of the same size and time."""
        path, time = self.image(place), self.now()
        before = int(path.stat().st_mtime) if keeps_time and path.suffix == ".bmp" else time
        with Image.open(path) as image:
            size = image.size
        self.paint(path, size, before)

    @rule(place=places)
    def cut(self, place: int) -> None:
        time = self.now()
        self.paint(self.image(place), (64, 64 + self.num_made % 5), time)

    @rule(place=places)
    def touch(self, place: int) -> None:
        time = self.now()
        os.utime(self.image(place), (time, time))
        self.edited[self.image(place).name] = time

    @rule(place=places, takes_entries=st.booleans())
    def rename(self, place: int, takes_entries: bool) -> None:
        path = self.image(place)
        self.now()
        stem = f"r{self.num_made:03d}"
        self.edited[f"{stem}{path.suffix}"] = self.edited.pop(path.name)
        for file in list(self.folder.glob(f"{path.stem}_*.npz")) if takes_entries else ():
            name = file.name.replace(path.stem, stem)
            for key in [key for key in self.entries if key[0] == file.name]:
                self.entries[name, key[1]] = self.entries.pop(key)
            file.rename(self.folder / name)
        path.rename(self.folder / f"{stem}{path.suffix}")

    @rule(place=places, other=places)
    def copy_entry(self, place: int, other: int) -> None:
        """Put the entries of an image in the place of another one's of the same size."""
        if self.gathered:
            return
        self.check()
        source, target = self.file_of(self.image(place)), self.file_of(self.image(other))
        if source.name.split("_")[1] == target.name.split("_")[1] and source != target:
            shutil.copy2(source, target)
            for key in [key for key in self.entries if key[0] == target.name]:
                del self.entries[key]
            self.entries |= {(target.name, key[1]): one for key, one in self.entries.items() if key[0] == source.name}

    @precondition(lambda self: len(self.edited) > 2)
    @rule(place=places)
    def remove(self, place: int) -> None:
        path = self.image(place)
        path.unlink()
        del self.edited[path.name]

    # Settings

    @rule(name=st.sampled_from(["vae", "other vae", "a third one"]))
    def use_vae(self, name: str) -> None:
        self.vae = name

    @rule(width=st.sampled_from([64, 128]))
    def use_resolution(self, width: int) -> None:
        self.width = width

    @rule(flags=st.sets(st.sampled_from(FLAGS)))
    def use_flags(self, flags: set[str]) -> None:
        self.flags = frozenset(flags)

    @rule(is_rgba=st.booleans())
    def use_base_model(self, is_rgba: bool) -> None:
        self.spec = RGBA if is_rgba else SPEC

    # Files

    @rule(place=places, how=st.sampled_from(sorted(SPOILERS)))
    def spoil(self, place: int, how: str) -> None:
        """Spoil an entry and check that the log says why it alone is encoded again."""
        if self.gathered:
            return
        self.check()
        (spoil, reason), path = SPOILERS[how], self.image(place)
        spoil(self.file_of(path))
        for key in [key for key in self.entries if key[0] == self.file_of(path).name]:
            del self.entries[key]
        self.log.clear()
        self.check()
        (line,) = [line for line in self.log if "stale" in line and " 0 stale" not in line]
        assert "0 to encode, 1 stale" in line and re.search(f"1 .*{reason}", line) and self.file_of(path).name in line

    @rule(place=places, replaced=st.sampled_from(["origin", "latents", "latents_flipped"]))
    def save_by_sd_scripts(self, place: int, replaced: str) -> None:
        """Take away the notes, which sd-scripts does not write, or leave them beside other latents: then the VAE is
        unknown and the latents are used."""
        if self.gathered:
            return
        self.check()
        path, time = self.file_of(self.image(place)), self.now()
        change_arrays(path, replaced != "origin", **({} if replaced == "origin" else {replaced: lambda a: a + 1}))
        os.utime(path, (time, time))
        with np.load(path) as archive:
            for key, entry in self.entries.items():
                if key[0] == path.name and (replaced == "origin" or f"{replaced}{key[1]}" in archive):
                    self.entries[key] = replace(entry, foreign=(time, archive[f"latents{key[1]}"].tolist()))

    @rule(place=places)
    def save_by_earlier_version(self, place: int) -> None:
        """Let the notes hold the time of an image that is not compressed, in place of that it hides edits."""
        if self.gathered:
            return
        self.check()
        path = self.image(place)
        stamp = path.stat().st_mtime_ns

        def with_time(note: np.ndarray) -> np.ndarray:
            text = json.dumps({**json.loads(note.tobytes()), "picture_mtime_ns": stamp})
            return np.frombuffer(text.encode(), dtype=np.uint8)

        change_arrays(self.file_of(path), True, origin=with_time)

    @rule(place=places)
    def put_foreign_file(self, place: int) -> None:
        """A file that is no cache is named and kept."""
        path = self.file_of(self.image(place))
        for key in [key for key in self.entries if key[0] == path.name]:
            del self.entries[key]
        for content in (b"no archive", b"PK\x05\x06" + bytes(18)):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"exists and is .*, not a latent cache") as error:
                self.cache(DISK)
            assert path.name in str(error.value) and path.read_bytes() == content
        path.unlink()

    # Runs

    @rule(number=st.integers(0, 3), operation=st.sampled_from(["replace", "fsync", "encode"]))
    def interrupt(self, number: int, operation: str) -> None:
        """Stop a run at an operation; nothing half-written is left."""
        stop = stop_at(number, KeyboardInterrupt())
        patched: AbstractContextManager[Any] = (
            mock.patch.object(os, operation, wrap(getattr(os, operation), stop))
            if operation != "encode"
            else mock.patch(f"{__name__}.vae", lambda name, calls: ENCODE(name, calls, stop))
        )
        with patched:
            with suppress(KeyboardInterrupt):
                self.cache(DISK)
        self.is_certain = False
        assert not list(self.folder.glob(".*"))

    @rule(number=st.integers(0, 2))
    def fill_disk(self, number: int) -> None:
        stop = stop_at(number, OSError(28, "No space left on device"))
        with mock.patch.object(os, "fsync", wrap(os.fsync, stop)):
            try:
                self.cache(DISK)
            except UserError as error:
                assert "cannot be written (No space left on device)" in str(error)
                assert "use --cache_latents to" in str(error)
        self.is_certain = False
        assert not list(self.folder.glob(".*"))

    @rule(is_shared=st.booleans())
    def run_two(self, is_shared: bool) -> None:
        """Run two processes that share the work, or two runs that do not know of each other."""
        board, wanted = Board(), self.count_wanted()

        def run(rank: int) -> tuple[dict[str, Any], int]:
            group = Processes(rank, 2, local_rank=rank, local_count=2, store=board) if is_shared else ALONE
            return self.cache(DISK, group)

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(run, range(2)))
        assert results[0][0].keys() == results[1][0].keys()
        count = sum(count for _, count in results)
        assert count == wanted if is_shared and self.is_certain else count <= 2 * wanted
        self.compare(results[0][0])
        self.compare(results[1][0])
        self.note_made()

    @rule()
    def gather(self) -> None:
        """Let the next two changes come before a run."""
        self.gathered = 3

    @invariant()
    def check_unless_gathering(self) -> None:
        self.gathered = max(0, self.gathered - 1)
        if not self.gathered and hasattr(self, "handler"):
            self.check()

    def check(self) -> None:
        """Run twice: values are those of a run without a cache, and only what changed is encoded, once."""
        self.gathered = 0
        wanted = self.count_wanted()
        values, count = self.cache(DISK)
        assert count == wanted if self.is_certain else count <= wanted
        self.compare(values)
        self.note_made()
        again, count = self.cache(DISK)
        assert count == 0 and again == values

    # What must be there

    def cache(self, options: CachingOptions, processes: Processes = ALONE) -> tuple[dict[str, Any], int]:
        """Return latents and mask of every image by name, and the number of encoded images and mirrored copies."""
        calls: list[int] = []
        line = f"--resolution {self.width},64 {' '.join(self.flags)}"
        plan = plan_of(options_of(line, "--train_data_dir", str(self.root)), spec=self.spec)
        encode, name = vae(self.vae, calls), self.vae
        batches = open_batches(plan, cache_latents(plan, encode, lambda: name, options, 1, processes))
        values = {}
        for batch in batches_of(batches):
            masks = [None] * len(batch.keys) if batch.masks_B1HW is None else batch.masks_B1HW.tolist()
            assert batch.latents_BCHW is not None
            values |= {
                Path(key).name: (latents, mask)
                for key, latents, mask in zip(batch.keys, batch.latents_BCHW.tolist(), masks, strict=True)
            }
        return values, sum(calls)

    def compare(self, values: dict[str, Any]) -> None:
        expected, _ = self.cache(MEMORY)
        assert values.keys() == expected.keys() == self.edited.keys()
        for path in map(self.image, range(len(values))):
            entry = self.entries.get(self.key_of(path))
            if entry is not None and entry.foreign and self.is_valid(path):
                latents, mirrored = entry.foreign[1], np.flip(entry.foreign[1], -1).tolist()
                assert values[path.name][0] == latents or ("--flip_aug" in self.flags and mirrored is not None)
            else:
                assert values[path.name] == expected[path.name], path.name

    def file_of(self, path: Path) -> Path:
        with Image.open(path) as image:
            return path.with_name(f"{path.stem}_{image.width:04d}x{image.height:04d}{self.spec.cache_suffix}")

    def key_of(self, path: Path) -> tuple[str, str]:
        return self.file_of(path).name, f"_8x{self.width // 8}"

    def wanted(self, path: Path) -> Entry:
        extras = frozenset(flag for flag in FLAGS[:2] if flag in self.flags)
        is_opaque = self.spec.has_alpha and "--alpha_mask" in self.flags
        digest = blake2b(path.read_bytes()).hexdigest()
        return Entry((path.name, digest, f"{self.vae}{is_opaque}", str(FLAGS[2] in self.flags)), extras)

    def is_valid(self, path: Path) -> bool:
        entry, wanted = self.entries.get(self.key_of(path)), self.wanted(path)
        if entry is None or not wanted.extras <= entry.extras:
            return False
        return self.edited[path.name] <= entry.foreign[0] if entry.foreign else entry.source == wanted.source

    def count_wanted(self) -> int:
        stale = [path for path in map(self.image, range(len(self.edited))) if not self.is_valid(path)]
        return len(stale) * (2 if "--flip_aug" in self.flags else 1)

    def note_made(self) -> None:
        """Note that every entry that was not valid has been made."""
        for path in map(self.image, range(len(self.edited))):
            if not self.is_valid(path):
                self.entries[self.key_of(path)] = self.wanted(path)
        self.is_certain = True


ENCODE = vae


def wrap(function: Callable[..., Any], first: Callable[..., None]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        first()
        return function(*arguments, **keywords)

    return wrapped


TestLatentCacheStates = LatentCacheStates.TestCase
TestLatentCacheStates.settings = any_walk(num_examples=6, num_steps=10)

PATHS: dict[str, Sequence[Step]] = {
    "edited": [("edit", {"place": 0, "keeps_time": False})],
    "edited, not compressed, with its time": [("edit", {"place": 1, "keeps_time": True})],
    "touched": [("touch", {"place": 0})],
    "other size": [("cut", {"place": 0})],
    "renamed with its entries": [("rename", {"place": 0, "takes_entries": True})],
    "entries of another image": [("copy_entry", {"place": 0, "other": 2})],
    "other VAE and back": [("use_vae", {"name": "other vae"}), ("use_vae", {"name": "vae"})],
    "filter": [("use_flags", {"flags": {FLAGS[2]}})],
    "mirrored, then another VAE": [("use_flags", {"flags": {FLAGS[0]}}), ("use_vae", {"name": "other vae"}),
                                   ("use_flags", {"flags": set()}), ("use_flags", {"flags": {FLAGS[0]}})],
    "mask": [("use_flags", {"flags": {FLAGS[1]}}), ("use_flags", {"flags": set()})],
    "alpha as mask": [("use_base_model", {"is_rgba": True}), ("use_flags", {"flags": {FLAGS[1]}}),
                      ("use_flags", {"flags": set()})],
    "two sizes in one file": [("use_resolution", {"width": 128}), ("use_resolution", {"width": 64})],
    "of sd-scripts, other VAE, then edited": [
        ("save_by_sd_scripts", {"place": 0, "replaced": "origin"}), ("use_vae", {"name": "other vae"}),
        ("edit", {"place": 0, "keeps_time": False})],
    "mirrored copies replaced, then another VAE": [
        ("use_flags", {"flags": {FLAGS[0]}}), ("save_by_sd_scripts", {"place": 0, "replaced": "latents_flipped"}),
        ("use_vae", {"name": "other vae"})],
    "of an earlier version, then edited": [("save_by_earlier_version", {"place": 1}),
                                           ("edit", {"place": 1, "keeps_time": True})],
    "of sd-scripts, edited before another size": [
        ("save_by_sd_scripts", {"place": 0, "replaced": "origin"}), ("gather", {}),
        ("edit", {"place": 0, "keeps_time": False}), ("use_resolution", {"width": 128}),
        ("use_resolution", {"width": 64})],
    "foreign file": [("put_foreign_file", {"place": 0})],
    "disk full": [("use_vae", {"name": "other vae"}), ("gather", {}), ("use_vae", {"name": "vae"}),
                  ("edit", {"place": 0, "keeps_time": False}), ("fill_disk", {"number": 0})],
    **{f"interrupted at {operation}": [("gather", {}), ("use_vae", {"name": "other vae"}),
                                       ("interrupt", {"number": 1, "operation": operation})]
       for operation in ("replace", "fsync", "encode")},
    **{f"two at once, {'' if is_shared else 'not '}together": [
        ("gather", {}), ("use_vae", {"name": "other vae"}), ("run_two", {"is_shared": is_shared})]
       for is_shared in (True, False)},
    **{how: [("spoil", {"place": 0, "how": how})] for how in SPOILERS},
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_cache_is_never_stale_on_a_path_where_it_once_could_be(path: Sequence[Step]) -> None:
    states = LatentCacheStates()
    walk(states, path, states.check_unless_gathering)
