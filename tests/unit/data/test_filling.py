"""Behaviour that both caches share, and memory that processes share."""

import logging
import multiprocessing
import pickle
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from library.base.errors import UserError
from library.checkpoints.overwriting import known_by_start
from library.data.batches import planned
from library.data.batches.batches import BatchMaker
from library.data.batches.planned import build_batch_maker
from library.data.batches.shared import SharedMaker
from library.data.caching.captions import cache_texts
from library.data.caching.filling import CheckedJob, Codec, fill
from library.data.caching.latents import cache_latents
from library.data.caching.stores import NO_LATENTS, NO_TEXTS, CacheFiles
from library.data.decoding.npz import MISSING, CacheWords, Verdict, open_to_write
from library.data.description.buckets import Shape
from library.data.plan.samples import Samples
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.processes.process_group import ALONE, Processes
from tests.unit.data.builders import batches_of, content_of, options_of, plan_of, write_folder
from tests.unit.data.test_columns import make_images
from tests.unit.data.test_seen_references import encoding_of
from tests.unit.data.test_seen_references import plan as plan_with_references
from tests.unit.data.test_text_cache import DISK
from tests.unit.test_processes import Board

WORDS = CacheWords("word cache", "words", "words", "cache_words", "checking words", "caching words")

KIND = known_by_start("a word", lambda start: start != b"mine")


@dataclass(frozen=True)
class Job:
    path: str
    word: str


@dataclass
class Cache:
    """A cache of files with one word each; `made` lists those that were written."""

    made: list[str] = field(default_factory=list)

    @property
    def codec(self) -> Codec[Job]:
        return Codec(WORDS, KIND, self.judge, self.make, self.named)

    def named(self, job: Job) -> Iterator[Job]:
        yield job
        yield replace(job, path=job.path.replace(".txt", ".old"))

    def judge(self, job: Job) -> Verdict:
        path = Path(job.path)
        if not path.exists():
            return Verdict(MISSING)
        return Verdict(None if path.read_text() == job.word else "of another word")

    def make(self, share: Sequence[CheckedJob[Job]]) -> None:
        for checked in share:
            with open_to_write(checked.path, WORDS) as temporary:
                temporary.write_text(checked.requested.word)
            self.made.append(Path(checked.path).name)


def jobs_of(folder: Path, *words: str) -> list[Job]:
    return [Job(str(folder / f"{word}.txt"), word) for word in words]


def test_valid_files_are_reused_and_stale_ones_reported_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs, cache = jobs_of(tmp_path, "a", "b", "c", "d"), Cache()
    Path(jobs[0].path).write_text("a")
    Path(jobs[1].path).write_text("x")
    (tmp_path / "c.old").write_text("c")
    with caplog.at_level(logging.INFO):
        results = fill(cache.codec, jobs, False, 1, ALONE)
    assert cache.made == ["b.txt", "d.txt"]
    assert sorted(Path(job.path).name for job in results) == ["a.txt", "b.txt", "c.old", "d.txt"]
    line = "word cache: 2 words reused, 1 to encode, 1 stale (1 of another word: "
    assert f"{line}{jobs[1].path})" in caplog.text
    fill(cache.codec, jobs, False, 1, ALONE)
    assert len(cache.made) == 2


def test_skipping_the_check_trusts_files_under_either_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs, cache = jobs_of(tmp_path, "a", "b"), Cache()
    (tmp_path / "a.old").write_text("x")
    with caplog.at_level(logging.INFO):
        fill(cache.codec, jobs, True, 1, ALONE)
    assert cache.made == ["b.txt"]
    assert "word cache: 1 words reused unchecked (--skip_cache_check), 1 to encode" in caplog.text


@pytest.mark.parametrize("per_machine", [3, 1], ids=["one machine", "machines with disks of their own"])
def test_processes_divide_the_files_and_each_machine_has_all(tmp_path: Path, per_machine: int) -> None:
    """Two jobs of the same file go to one process; otherwise the second would overwrite the first."""
    board, words = Board(), ["a", "b", "c", "d", "e"]

    def run(rank: int) -> list[str]:
        processes = Processes(rank, 3, local_rank=rank % per_machine, local_count=per_machine, store=board)
        folder = tmp_path / str(rank // per_machine)
        cache, jobs = Cache(), jobs_of(folder, *words)
        fill(cache.codec, [*jobs, jobs[0]], False, 1, processes)
        return cache.made

    with ThreadPoolExecutor(3) as pool:
        written_by_process = list(pool.map(run, range(3)))
    num_machines = 3 // per_machine
    for machine in range(num_machines):
        assert sorted(path.stem for path in (tmp_path / str(machine)).iterdir()) == words
    assert sum("a.txt" in written for written in written_by_process) == num_machines
    assert sorted(set(word for written in written_by_process for word in written)) == [f"{word}.txt" for word in words]


def test_the_error_for_an_unwritable_folder_suggests_a_solution(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the word cache .* cannot be written .*use --cache_words to keep words"):
        fill(Cache().codec, jobs_of(tmp_path / "file", "a"), False, 1, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_no_cache_is_kept(tmp_path: Path) -> None:
    jobs, cache = jobs_of(tmp_path, "a", "b"), Cache()
    Path(jobs[1].path).write_text("mine")
    with pytest.raises(UserError, match=r"--cache_words_to_disk: .*b.txt exists and is a text file, not a word"):
        fill(cache.codec, jobs, False, 1, ALONE)
    assert Path(jobs[1].path).read_text() == "mine" and not cache.made


# Worker processes that are not forked read the columns of the plan from shared memory.


def maker_for(count: int) -> BatchMaker:
    """Return a batch maker for images that do not exist."""
    shapes = (Shape((64, 64), (64, 64)),)
    samples = Samples((make_images(count, 3),), (0,), shapes, np.zeros(count, np.int32), np.ones(count, np.int32))
    order = np.random.default_rng(4).permutation(count).astype(np.int32)
    return BatchMaker(1, samples, order, (), 1.0, 10, CacheFiles(), frozenset())


def test_the_pickled_size_for_a_worker_does_not_grow_with_the_images() -> None:
    few, many = (len(ForkingPickler.dumps(SharedMaker.of(maker_for(count)))) for count in (200, 20_000))
    assert many - few < 100 and many < 5_000
    assert len(ForkingPickler.dumps(maker_for(20_000))) > 1_000_000  # the size without shared memory


def test_unpickled_data_is_equal_and_in_shared_memory() -> None:
    maker = maker_for(1_000)
    shared = SharedMaker.of(maker)
    assert shared.columns.is_shared()
    unpickled = pickle.loads(ForkingPickler.dumps(shared))
    assert list(unpickled.maker.samples) == list(maker.samples)
    assert np.array_equal(unpickled.maker.sample_of_draw, maker.sample_of_draw)
    columns, images = unpickled.columns.numpy(), unpickled.maker.samples.subsets[0]
    for array in (unpickled.maker.sample_of_draw, images.names.content, images.captions.ends, images.sizes_N2):
        assert np.shares_memory(array, columns)
    shared.columns.zero_()
    assert not unpickled.maker.sample_of_draw.any()


def test_a_plan_without_images_can_be_pickled() -> None:
    assert len(pickle.loads(ForkingPickler.dumps(SharedMaker.of(maker_for(0)))).maker.samples) == 0


@pytest.fixture(
    params=["spawn", pytest.param("forkserver", marks=pytest.mark.skipif(sys.platform == "win32", reason="no forks"))]
)
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """Start worker processes as on macOS and Windows, and as on Linux with Python 3.14."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(usual, force=True)


@pytest.mark.slow
def test_workers_that_are_not_forked_give_the_same_batches_as_this_process(
    tmp_path: Path, start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_makers: list[SharedMaker] = []
    of = SharedMaker.of
    monkeypatch.setattr(SharedMaker, "of", lambda maker: shared_makers.append(of(maker)) or shared_makers[-1])
    preloaded: list[list[str]] = []
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", preloaded.append)
    write_folder(tmp_path / "2_a", 3, (70, 64), "one, two, three")
    command = "--resolution 64 --train_batch_size 2 --caption_extension .txt --shuffle_caption --flip_aug"
    plan = plan_of(options_of(command, "--train_data_dir", str(tmp_path)))
    expected = [content_of(batch) for batch in batches_of(plan)]
    assert [content_of(batch) for batch in batches_of(open_batches(plan), workers=1)] == expected
    assert len(shared_makers) == 1
    assert preloaded == ([["__main__", planned.__name__]] if start_method == "forkserver" else [])


@pytest.mark.slow
def test_workers_that_are_not_forked_read_caches_and_references(tmp_path: Path, start_method: str) -> None:
    """Use latents on disk and text features that are cached for references too."""
    plan = plan_with_references(tmp_path, "flip_aug = true")
    texts = cache_texts(plan, encoding_of(DISK, []), (), False).store
    caches = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
    latents = cache_latents(plan, lambda pixels, _: pixels[:, :, ::8, ::8], lambda: "vae", caches, 1)
    results = []
    for workers in (0, 1):
        batches = batches_of(open_batches(plan, latents, texts), workers=workers)
        results.append([[b.latents_BCHW, *b.reference_latents, dict(b.conditioning or {})] for b in batches])
    assert len(results[0]) == 2 and len(results[0][0]) == 3
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_the_error_for_full_shared_memory_suggests_a_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    write_folder(tmp_path / "1_a", 2)
    plan = plan_of(options_of("--resolution 64", "--train_data_dir", str(tmp_path)))
    with pytest.raises(UserError, match=r"--max_data_loader_n_workers: shared memory .*No space left.*use 0"):
        SharedMaker.of(build_batch_maker(plan, NO_LATENTS, NO_TEXTS))
