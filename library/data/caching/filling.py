"""The update of a disk cache: check the existing files, make the others, and log the result.

Shared by latents and text features. A `Codec` holds the differences: the possible files of a job, the check of a file,
and the making of files. Encoding belongs entirely to the codec, because the two have little in common: images are
decoded ahead of the VAE and written by a thread, while captions shared by several files are kept for the next ones.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from library.base.errors import list_few
from library.checkpoints.overwriting import FileKind, check_target
from library.data.decoding.npz import MISSING, CacheWords, Verdict, clear_left_overs
from library.data.decoding.threads import read_many
from library.data.scanned.names import same_file_key
from library.processes.process_group import Processes

logger = logging.getLogger(__name__)

ADD_ENCODERS = "add the {}, or fill the cache on another machine"  # if the encoder is missing


class HasPath(Protocol):
    """Protocol of a job: whatever is cached in one file."""

    @property
    def path(self) -> str: ...


JobT = TypeVar("JobT", bound=HasPath)


@dataclass(frozen=True, slots=True)
class CheckedJob(Generic[JobT]):
    """A job with the result of checking its file on disk."""

    requested: JobT
    job: JobT  # with the file that was found, which may have another name or place
    verdict: Verdict

    @property
    def path(self) -> str:
        """The path that the job requests, which is written if the file must be remade."""
        return self.requested.path


@dataclass(frozen=True)
class Codec(Generic[JobT]):
    """The operations in which caches differ."""

    words: CacheWords
    kind: FileKind  # of the files that may be replaced
    judge: Callable[[JobT], Verdict]
    make: Callable[[Sequence[CheckedJob[JobT]]], None]  # encodes and writes; called in every process, even with no jobs
    candidates: Callable[[JobT], Iterable[JobT]] = lambda job: (job,)  # the job with each possible file name
    remark: Callable[[Sequence[CheckedJob[JobT]]], None] = lambda found: None  # logs further remarks after a check


def fill(
    codec: Codec[JobT], jobs: Sequence[JobT], skips_check: bool, num_threads: int, processes: Processes
) -> list[JobT]:
    """Bring every file up to date, each process its share. Return the jobs with the files that hold them.

    Valid files are kept, so an interrupted run can continue. Unfinished files of killed runs are deleted. With
    `skips_check`, existing files are trusted. Raises UserError for a file in the place of an entry that is no cache.
    """
    usable: list[JobT] = []
    if processes.is_main:
        clear_left_overs(os.path.dirname(job.path) for job in jobs)

    def find_stale(candidates: Sequence[JobT], when: str) -> list[CheckedJob[JobT]]:
        results = check_files(codec, candidates, skips_check, num_threads)
        usable.extend(result.job for result in results if result.verdict.fault is None)
        # A process that already writes would shorten the list of one that still checks, and all must split the same
        # list.
        processes.wait_for_all(f"{codec.words.checking}{when}")
        return [result for result in results if result.verdict.fault is not None]

    stale = find_stale(jobs, "")
    for result in stale:
        if result.verdict.fault != MISSING:
            check_target(f"--{codec.words.flag}_to_disk:", Path(result.path), codec.kind)
    codec.make(assign_jobs(stale, processes.rank, processes.count))
    processes.wait_for_all(codec.words.caching)
    # Files on another machine's local disk are missing here, and each machine has to make them itself. On a shared disk
    # this check finds nothing.
    if processes.num_machines > 1:
        stale = find_stale([result.requested for result in stale], " again")
        codec.make(assign_jobs(stale, processes.local_rank, processes.local_count))
        processes.wait_for_all(f"{codec.words.caching} again")
    return [*usable, *(result.requested for result in stale)]


def assign_jobs(jobs: Sequence[JobT], rank: int, count: int) -> list[JobT]:
    """Return one process's share of the jobs. Jobs of one file stay together: one process writes the whole file."""
    numbers: dict[str, int] = {}
    return [job for job in jobs if numbers.setdefault(same_file_key(job.path), len(numbers)) % count == rank]


def check_files(
    codec: Codec[JobT], jobs: Sequence[JobT], skips_check: bool, num_threads: int
) -> list[CheckedJob[JobT]]:
    def check(job: JobT) -> CheckedJob[JobT]:
        rejected = CheckedJob(job, job, Verdict(MISSING))
        for candidate in codec.candidates(job):
            if skips_check:
                verdict = Verdict(None if os.access(candidate.path, os.R_OK) else MISSING)
            else:
                verdict = codec.judge(candidate)
            if verdict.fault is None:
                return CheckedJob(job, candidate, verdict)
            # What is wrong with an existing file says more than that a further name is missing.
            if rejected.verdict.fault == MISSING:
                rejected = CheckedJob(job, candidate, verdict)
        return rejected

    results = read_many(check, jobs, num_threads, f"checking {codec.words.name}")
    report_check(codec.words, results, skips_check)
    codec.remark(results)
    return results


def report_check(words: CacheWords, found: Sequence[CheckedJob[JobT]], skips_check: bool) -> None:
    """Log how many entries are reused, missing and stale, and why."""
    faults: dict[str, list[str]] = defaultdict(list)
    for result in found:
        if result.verdict.fault is not None:
            faults[result.verdict.fault].append(result.job.path)
    missing = faults.pop(MISSING, [])
    num_stale = sum(len(paths) for paths in faults.values())
    reasons = "; ".join(f"{len(paths)} {reason}: {list_few(paths, 2)}" for reason, paths in faults.items())
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
