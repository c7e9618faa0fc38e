"""Behaviour shared by the latent and the text feature cache, tested with a cache of small text files."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.checkpoints.overwriting import known_by_start
from library.data.caching.filling import CheckedJob, Codec, fill
from library.data.decoding.npz import MISSING, CacheWords, Verdict, open_to_write
from library.processes.process_group import ALONE, Processes
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
