"""The text cache as a state machine: whatever happens to captions, files, encoders and runs, no feature is stale, no
caption is encoded without need, and no file is lost."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from library.base.errors import UserError
from library.processes.process_group import ALONE, Processes
from library.types import Conditioning
from tests.fuzz.budget import Step, any_walk, walk
from tests.fuzz.test_latent_cache_states import damage, stop_at, wrap
from tests.unit.data.builders import write_image
from tests.unit.data.test_text_cache import DISK, Cached, assert_same_features, cache, draws_of, npz_bytes, rewrite
from tests.unit.test_processes import Board

EMPTY = ".empty_prompt"
places = st.integers(0, 5)


def features(caption: str, encoders: Sequence[str]) -> dict[str, Tensor]:
    """Return features that are unique to a caption and its encoders."""
    digest = blake2b("\n".join((caption, *encoders)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    hidden, pooled = torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)
    return {"hidden": hidden.bfloat16(), "pooled": pooled, "mask": torch.arange(5) < len(caption) % 5}


def change_note(path: Path, change: Callable[[Any], Any]) -> None:
    with np.load(path) as archive:
        note = change(json.loads(archive["captions"].tobytes()))
    rewrite(path, True, captions=np.frombuffer(json.dumps(note).encode(), dtype=np.uint8))


def drop_last_checksum(note: Any) -> Any:
    return {**note, "checksums": dict(list(note["checksums"].items())[:-1])}


ANOTHER = "by another program"
SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda path: damage(path, slice(path.stat().st_size // 2)), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "damaged"),
    "note": (lambda path: change_note(path, lambda note: [1, "x"]), ANOTHER),
    "a caption without a checksum": (lambda path: change_note(path, drop_last_checksum), "damaged"),
    "rewritten": (lambda path: rewrite(path, True, pooled=np.zeros(4, dtype=np.float32)), ANOTHER),
    "without note": (lambda path: rewrite(path, False, pooled=np.zeros(4, dtype=np.float32)), ANOTHER),
    "without a key": (lambda path: remove_entry(path, "mask"), ANOTHER),
}  # fmt: skip


def remove_entry(path: Path, name: str) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files if key != name}
    np.savez(path, **arrays)


class TextCacheStates(RuleBasedStateMachine):
    """Captions, cache files and encoders, and what every file must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="texts-"))
        self.folder = self.root / "1_a"
        self.encoders = {"identity": "encoders", "words": "a cat", "settings": "", "dtype": "bf16"}
        self.num_variants = 1
        self.made: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {}  # by stem: encoders, captions
        self.num_images = self.gathered = 0
        self.is_certain = True
        self.log: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("library.data.caching.filling").addHandler(self.handler)
        for _ in range(2):
            self.add()
        self.check()

    def teardown(self) -> None:
        try:
            self.check()
        finally:
            logging.getLogger("library.data.caching.filling").removeHandler(self.handler)
            shutil.rmtree(self.root)

    # Images and captions

    def stem(self, place: int) -> str:
        stems = sorted(path.stem for path in self.folder.glob("*.png"))
        return stems[place % len(stems)]

    def write_caption(self, stem: str) -> None:
        self.num_images += 1
        (self.folder / f"{stem}.txt").write_text(f"one, two, three, four, five, {self.num_images}")

    @rule()
    def add(self) -> None:
        stem = f"p{self.num_images:03d}"
        write_image(self.folder / f"{stem}.png", seed=self.num_images)
        self.write_caption(stem)

    @rule(place=places)
    def edit(self, place: int) -> None:
        self.write_caption(self.stem(place))

    @rule(place=places)
    def rename(self, place: int) -> None:
        """Rename an image with its caption and its file: without variants the file still fits."""
        stem, new = self.stem(place), f"r{self.num_images:03d}"
        self.num_images += 1
        for path in list(self.folder.glob(f"{stem}[._]*")):
            path.rename(path.with_name(path.name.replace(stem, new)))
        if stem in self.made:
            self.made[new] = self.made.pop(stem)

    @rule(place=places, other=places)
    def copy_file(self, place: int, other: int) -> None:
        source, target = self.stem(place), self.stem(other)
        if source in self.made and source != target:
            shutil.copy2(self.file_of(source), self.file_of(target))
            self.made[target] = self.made[source]

    @precondition(lambda self: len(list(self.folder.glob("*.png"))) > 2)
    @rule(place=places)
    def remove(self, place: int) -> None:
        (self.folder / f"{self.stem(place)}.png").unlink()

    # Encoders and settings

    @rule(change=st.sampled_from([("identity", "others"), ("identity", "encoders"), ("words", "cat a"), ("dtype", "no"),
                                  ("settings", "512 tokens"), ("words", "a cat"), ("settings", "")]))  # fmt: skip
    def use(self, change: tuple[str, str]) -> None:
        self.encoders[change[0]] = change[1]

    @rule(number=st.sampled_from([1, 3, 5]))
    def use_variants(self, number: int) -> None:
        self.num_variants = number

    # Files

    @rule(place=places, how=st.sampled_from(sorted(SPOILERS)))
    def spoil(self, place: int, how: str) -> None:
        """Spoil a file and check that the log says why it alone is made again."""
        self.check()
        (spoil, reason), stem = SPOILERS[how], self.stem(place)
        spoil(self.file_of(stem))
        del self.made[stem]
        self.log.clear()
        self.check()
        (line,) = [line for line in self.log if "stale" in line and " 0 stale" not in line]
        assert f"0 to encode, 1 stale (1 {reason}" in line and self.file_of(stem).name in line

    @rule()
    def forget_tokenizers(self) -> None:
        """Files of an earlier version do not name their tokenizer, and are used whatever this run's is."""
        self.check()
        before = {path: path.read_bytes() for path in self.folder.glob("*_tiny_te.npz")}
        for path in before:
            change_note(path, lambda note: {key: note[key] for key in note if key != "tokenizers"})
        words, self.encoders["words"] = self.encoders["words"], "x y z"
        assert self.run()[1] == []
        self.encoders["words"] = words
        for path, content in before.items():
            path.write_bytes(content)

    @precondition(lambda self: self.num_variants == 1)  # with others, none of the draws may read the spoilt one
    @rule(place=places)
    def flip_bit(self, place: int) -> None:
        """The check reads no features: a bit that flips in them is found when they are read."""
        self.check()
        path = self.file_of(self.stem(place))
        content = path.read_bytes()
        with np.load(path) as archive:
            at = content.index(archive["pooled"].tobytes())
        damage(path, slice(None), slice(at, at + 1))
        with pytest.raises(UserError, match=f"{path.name} is damaged.*delete it and run again"):
            draws_of(self.run()[0].batches)
        path.write_bytes(content)

    @rule(place=places)
    def put_foreign_file(self, place: int) -> None:
        stem = self.stem(place)
        path = self.file_of(stem)
        self.made.pop(stem, None)
        for content in (b"no archive", npz_bytes(depth=np.zeros(4))):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"_to_disk: .* not a cache of text features"):
                self.run()
            assert path.read_bytes() == content
        path.unlink()

    # Runs

    @rule(number=st.integers(0, 3), operation=st.sampled_from(["replace", "fsync"]), is_full=st.booleans())
    def stop(self, number: int, operation: str, is_full: bool) -> None:
        """Stop a run at an operation, by a signal or a full disk; nothing half-written is left."""
        error: BaseException = OSError(28, "No space left on device") if is_full else KeyboardInterrupt()
        with mock.patch.object(os, operation, wrap(getattr(os, operation), stop_at(number, error))):
            try:
                self.run()
            except KeyboardInterrupt:
                pass
            except UserError as refusal:
                assert "cannot be written (No space left on device)" in str(refusal)
        self.is_certain = False
        assert {path.name for path in self.folder.glob(".*")} <= {self.file_of(EMPTY).name}

    @rule(is_shared=st.booleans())
    def run_two(self, is_shared: bool) -> None:
        """Run two processes that share the work, or two runs that do not know of each other."""
        board = Board()

        def run(rank: int) -> tuple[Cached, list[str]]:
            group = Processes(rank, 2, local_rank=rank, local_count=2, store=board) if is_shared else ALONE
            return self.run(group)

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(run, range(2)))
        encoded = [text for _, texts in results for text in texts]
        assert len(set(encoded)) == len(encoded) or not is_shared
        for cached, _ in results:
            self.compare(cached)
        self.note_made(results[0][0], encoded)

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
        self.gathered = 0
        cached, encoded = self.run()
        self.compare(cached)
        self.note_made(cached, encoded)
        again, encoded = self.run()
        assert encoded == [] and again.num_loads == 0, "a second run loads no encoders"

    # What must be there

    def run(self, processes: Processes = ALONE) -> tuple[Cached, list[str]]:
        """Return the cache, and the captions that were encoded."""
        encoded: list[str] = []
        encoders = tuple(self.encoders.values())

        def encode(captions: Sequence[str]) -> Conditioning:
            encoded.extend(captions)
            rows = [features(caption, encoders) for caption in captions]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

        arguments = "" if self.num_variants == 1 else "--shuffle_caption"
        options = replace(DISK, text_cache_variants=self.num_variants, text_encoder_batch_size=2)
        return cache(self.root, arguments, options, encode=encode, processes=processes, **self.encoders), encoded

    def compare(self, cached: Cached) -> None:
        encoders, captions = tuple(self.encoders.values()), self.captions(cached)
        for key, caption, row in draws_of(cached.batches, epochs=2):
            assert caption in captions[Path(key).stem]
            assert_same_features(row, features(caption, encoders))

    def captions(self, cached: Cached) -> dict[str, frozenset[str]]:
        samples = zip(cached.plan.samples, cached.plan.caption_texts(), strict=True)
        return {Path(sample.image.key).stem: frozenset(texts) for sample, texts in samples} | {EMPTY: frozenset({""})}

    def note_made(self, cached: Cached, encoded: list[str]) -> None:
        """Check that what was encoded is what the files lacked, and note what they hold."""
        encoders, lacked = tuple(self.encoders.values()), set[str]()
        for stem, texts in self.captions(cached).items():
            before, held = self.made.get(stem, (None, frozenset()))
            usable = held & texts if before == encoders else frozenset()
            lacked |= texts - usable
            if not texts <= usable:
                self.made[stem] = encoders, texts
        assert set(encoded) == lacked if self.is_certain else set(encoded) <= lacked
        self.is_certain = True

    def file_of(self, stem: str) -> Path:
        return self.folder / f"{stem}_tiny_te.npz"


TestTextCacheStates = TextCacheStates.TestCase
TestTextCacheStates.settings = any_walk(num_examples=6, num_steps=10)

PATHS: dict[str, Sequence[Step]] = {
    "edited": [("edit", {"place": 0})],
    "renamed": [("rename", {"place": 0})],
    "variants": [("use_variants", {"number": number}) for number in (3, 5, 1, 3)],
    "renamed with variants": [("use_variants", {"number": 3}), ("rename", {"place": 0})],
    "file of another image": [("copy_file", {"place": 0, "other": 1})],
    "earlier version": [("forget_tokenizers", {})],
    "flipped bit": [("flip_bit", {"place": 0})],
    "foreign file": [("put_foreign_file", {"place": 0})],
    **{f"other {name}": [("use", {"change": (name, value)})]
       for name, value in {"identity": "others", "words": "cat a", "dtype": "no", "settings": "512 tokens"}.items()},
    **{f"{'full disk' if is_full else 'killed'} at {operation}": [
        ("gather", {}), ("use", {"change": ("identity", "others")}),
        ("stop", {"number": 1, "operation": operation, "is_full": is_full})]
       for operation in ("replace", "fsync") for is_full in (True, False)},
    **{f"two at once, {'' if is_shared else 'not '}together": [
        ("gather", {}), ("use", {"change": ("identity", "others")}), ("run_two", {"is_shared": is_shared})]
       for is_shared in (True, False)},
    "the last variant without a checksum": [("use_variants", {"number": 3}),
                                            ("spoil", {"place": 0, "how": "a caption without a checksum"})],
    **{how: [("spoil", {"place": 0, "how": how})] for how in SPOILERS},
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_cache_is_never_stale_on_a_path_where_it_once_could_be(path: Sequence[Step]) -> None:
    states = TextCacheStates()
    walk(states, path, states.check_unless_gathering)
