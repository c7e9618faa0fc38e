"""Brings the files of a cache up to date: looks at what is there, has the rest made, and says what was found.

What is the same for latents and for text features is here. A `Codec` says what differs: which files may hold what a job
is about, what speaks against one, and how they are made. Encoding is left to it altogether, since it has little in
common: pictures are decoded ahead of the VAE and written by a thread, while captions that files share are kept for the
next ones.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from library.data.decoding.npz import MISSING, CacheWords, Verdict, clear_left_overs
from library.data.decoding.threads import in_blocks
from library.errors import few
from library.processes import Processes

logger = logging.getLogger(__name__)

WAY_OUT = "give the {}, or fill the cache on another machine"  # where what encodes is not there


class HasPath(Protocol):
    """What is to be in a file."""

    @property
    def path(self) -> str: ...


JobT = TypeVar("JobT", bound=HasPath)


@dataclass(frozen=True, slots=True)
class Found(Generic[JobT]):
    """What lies on disk for a job."""

    asked: JobT
    job: JobT  # with the file that was found, which may be called otherwise
    verdict: Verdict

    @property
    def path(self) -> str:
        """The file that the job asks for, and that is written where it is made again."""
        return self.asked.path


@dataclass(frozen=True)
class Codec(Generic[JobT]):
    """What one cache does in its own way."""

    words: CacheWords
    judge: Callable[[JobT], Verdict]
    make: Callable[[Sequence[Found[JobT]]], None]  # encode and write; called in every process, also for nothing
    candidates: Callable[[JobT], Iterable[JobT]] = lambda job: (job,)  # with each name that its file may have
    remark: Callable[[Sequence[Found[JobT]]], None] = lambda found: None  # more to say of a check


def fill(
    codec: Codec[JobT], jobs: Sequence[JobT], skips_check: bool, num_threads: int, processes: Processes
) -> list[JobT]:
    """Bring every file up to date, each process its share; gives the jobs with the files that hold them.

    What is in order is left alone, so an interrupted run goes on where it was; what a killed one had not finished is
    deleted. With `skips_check` files are trusted by their names.
    """
    usable: list[JobT] = []
    if processes.is_main:
        clear_left_overs(os.path.dirname(job.path) for job in jobs)

    def stale_ones(candidates: Sequence[JobT], when: str) -> list[Found[JobT]]:
        found = check_files(codec, candidates, skips_check, num_threads)
        usable.extend(one.job for one in found if one.verdict.fault is None)
        processes.wait_for_all(f"{codec.words.checking}{when}")  # so that all share out the same list
        return [one for one in found if one.verdict.fault is not None]

    stale = stale_ones(jobs, "")
    codec.make(shared_out(stale, processes.rank, processes.count))
    processes.wait_for_all(codec.words.caching)
    if processes.num_machines > 1:  # what another machine wrote on a disk of its own is missing here
        stale = stale_ones([one.asked for one in stale], " again")
        codec.make(shared_out(stale, processes.local_rank, processes.local_count))
        processes.wait_for_all(f"{codec.words.caching} again")
    return [*usable, *(one.asked for one in stale)]


def shared_out(jobs: Sequence[JobT], rank: int, count: int) -> list[JobT]:
    """One process's share of the jobs. Those of one file go to one process, since each writes the whole file."""
    numbers: dict[str, int] = {}
    return [job for job in jobs if numbers.setdefault(job.path, len(numbers)) % count == rank]


def check_files(codec: Codec[JobT], jobs: Sequence[JobT], skips_check: bool, num_threads: int) -> list[Found[JobT]]:
    """What lies on disk for each job, and lines in the log about it."""

    def look(job: JobT) -> Found[JobT]:
        first = Verdict(MISSING)
        for candidate in codec.candidates(job):
            if skips_check:
                verdict = Verdict(None if os.access(candidate.path, os.R_OK) else MISSING)
            else:
                verdict = codec.judge(candidate)
            if verdict.fault is None:
                return Found(job, candidate, verdict)
            if first.fault == MISSING:
                first = verdict
        return Found(job, job, first)

    def look_at_block(block: Sequence[JobT]) -> list[Found[JobT]]:
        return [look(job) for job in block]

    found = in_blocks(look_at_block, jobs, max(1, num_threads), f"checking {codec.words.name}")
    report_check(codec.words, found, skips_check)
    codec.remark(found)
    return found


def report_check(words: CacheWords, found: Sequence[Found[JobT]], skips_check: bool) -> None:
    """One line that says what is used, what is missing, what is made again and why."""
    faults: dict[str, list[str]] = defaultdict(list)
    for one in found:
        if one.verdict.fault is not None:
            faults[one.verdict.fault].append(one.path)
    missing = faults.pop(MISSING, [])
    num_stale = sum(len(paths) for paths in faults.values())
    reasons = "; ".join(f"{len(paths)} {reason}: {few(paths, 2)}" for reason, paths in faults.items())
    logger.log(
        logging.WARNING if num_stale else logging.INFO,
        "%s: %d %s reused%s, %d to encode, %d stale%s",
        words.name,
        len(found) - len(missing) - num_stale,
        words.entries,
        " unchecked (--skip_cache_check)" if skips_check else "",
        len(missing),
        num_stale,
        f" ({reasons})" if reasons else "",
    )
