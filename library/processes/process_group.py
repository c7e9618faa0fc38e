"""The processes of a run: ranks and communication. `accelerate launch --num_processes N` starts N processes."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor

from library.base.errors import UserError
from library.base.launcher import fsdp_version, launched_count, restart_count
from library.base.temporary_folders import Kind, make_temporary_folder
from library.processes.heartbeat import Heartbeat, Store

logger = logging.getLogger(__name__)

SHORT_SECONDS, POLL_SECONDS = 0.005, 0.1  # seconds between two checks of the store
LOG_EVERY_SECONDS = 60.0
SEARCH_S = 5  # seconds to find out why a process ended
WAIT_FOR_PEERS_S = 6.0  # heartbeats check every 2 s
# torch words broken connections in many ways. First letters are left out, since their case differs.
CONNECTION_ERRORS = ("onnection closed", "onnection reset", "onnection refused", "roken pipe", "NCCL", "timed out")
PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU")


@dataclass(frozen=True)
class Processes:
    """The rank and device of this process, and its communication with the other processes of the run."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Store | None = None  # None if there is only one process
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints messages."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True for the first process of its machine."""
        return self.local_rank == 0

    @property
    def machine(self) -> int:
        """The index of this machine. All machines must run the same number of processes."""
        return self.rank // self.local_count

    @property
    def num_machines(self) -> int:
        return -(-self.count // self.local_count)

    def share(self, key: str, text: str) -> str:
        """Return the main process's text in every process; blocks until it is available."""
        if self.store is None:
            return text
        if self.is_main:
            self.store.set(key, text)
        return self._wait_for(key)

    def merged(self, key: str, values: Mapping[int, str]) -> dict[int, str]:
        """Merge the mappings of all processes; every process must call it, once per `key`."""
        if self.store is None:
            return dict(values)
        self.store.set(f"{key} {self.rank}", json.dumps(list(values.items())))
        return {
            int(index): str(text)
            for rank in range(self.count)
            for index, text in json.loads(self._wait_for(f"{key} {rank}"))
        }

    def require_same(self, what: str, value: str) -> None:
        """Raise UserError if `value`, a description of this process's `what`, differs from that of the main process."""
        expected = self.share(f"same {what}", value)
        if value != expected:
            raise UserError(
                f"{what} of process {self.rank} differs from the main process: {value} here, {expected} there. Use the "
                "same on every machine"
            )

    def shared_folder(self, kind: Kind, parent: str | None = None) -> str:
        """Make a temporary folder in `parent` for all processes of this machine; it is deleted when the run ends."""
        key = f"folder/{kind}/{self.machine}"
        if self.is_local_main:
            folder = make_temporary_folder(kind, parent)
            if self.store is None:
                return folder
            self.store.set(key, folder)
        return self._wait_for(key)

    def wait_for_all(self, task: str) -> None:
        """Block until every process has called this with the same `task`, which must be unique in the run.

        Uses no collective and has no timeout, because one process may have hours more work than another. Raises
        ProcessLost if one has ended.
        """
        if self.store is None:
            return
        self.store.set(f"{task}/{self.rank}", "1")
        missing = [f"{task}/{rank}" for rank in range(self.count)]
        logged_at = time.monotonic()
        while missing := [key for key in missing if not self.store.check([key])]:
            self.require_all()
            time.sleep(POLL_SECONDS)
            if time.monotonic() - logged_at > LOG_EVERY_SECONDS:
                logged_at = time.monotonic()
                logger.info("%s: waiting for %d of %d processes", task, len(missing), self.count)

    def all_reduce(self, values: Tensor) -> None:
        """Sum a tensor over all processes in place. Raises ProcessLost if the collective fails."""
        try:
            torch.distributed.all_reduce(values)
        except RuntimeError as error:
            raise ProcessLost(f"{self.lost()} ({format_first_line(error)})") from error

    def lost(self) -> str:
        """Describe the process that was lost. Marks this process as ending because of it."""
        return self._find_lost(SEARCH_S) or "the connection to another process broke; see its own log for the reason"

    def _find_lost(self, num_looks: int) -> str | None:
        """Look for a lost process up to `num_looks` times, a second apart; return its description, or None."""
        if self.heartbeat is None:
            return None
        for look in range(num_looks):
            if (description := self.heartbeat.lost or self.heartbeat.find()) is not None:
                self.heartbeat.is_stopping = True
                return description
            if look + 1 < num_looks:
                time.sleep(1)
        return None

    @property
    def is_lost(self) -> bool:
        """True if another process is known to be lost, so that no collective can complete."""
        return self.heartbeat is not None and self.heartbeat.lost is not None

    def require_all(self) -> None:
        """Raise ProcessLost if another process is known to be lost."""
        if self.heartbeat is not None and self.heartbeat.lost is not None:
            self.heartbeat.is_stopping = True
            raise ProcessLost(self.heartbeat.lost)

    def _wait_for(self, key: str) -> str:
        """Wait for a value from another process. Raises ProcessLost if one has ended."""
        assert self.store is not None
        pause = SHORT_SECONDS
        # Polled, because a blocking get would not notice that the other process has ended.
        while not self.store.check([key]):
            self.require_all()
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return self.store.get(key).decode()

    @contextmanager
    def taking_part(self, *signals: type[BaseException]) -> Iterator[None]:
        """Report failures inside the block to the other processes (see `reporting_failures`), and deregister
        afterwards."""
        try:
            with self.reporting_failures(*signals):
                yield
            with suppress(RuntimeError):  # a launcher that is gone took the store with it
                self._wait_for_others()
        finally:
            if self.heartbeat is not None:
                self.heartbeat.stop()

    @contextmanager
    def reporting_failures(self, *signals: type[BaseException]) -> Iterator[None]:
        """Report an exception inside the block to the other processes.

        If another process was lost, its consequences are raised as ProcessLost: a broken connection, or one of the
        exceptions `signals`, with which a launcher then stops the remaining processes.
        """
        reported: tuple[type[BaseException], ...] = (Exception, *signals)
        try:
            yield
        except reported as error:
            if self.store is None or isinstance(error, ProcessLost):
                raise
            is_broken = isinstance(error, torch.distributed.DistError) or (
                isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION_ERRORS)
            )
            is_signal = isinstance(error, signals)
            lost = self._find_lost(SEARCH_S if is_broken else 1) if is_broken or is_signal else None
            # Ctrl-C reaches all processes: one that it ended earlier is not why this one ends.
            if lost is not None and not (is_signal and f": {type(error).__name__}: " in lost):
                raise ProcessLost(f"{lost} ({format_first_line(error)})") from error
            with suppress(RuntimeError):  # the store may be unreachable
                if not self.store.check([f"failure/{self.rank}"]):
                    self.store.set(f"failure/{self.rank}", format_first_line(error))
                    if not is_signal:
                        self._wait_for_others()
            raise

    def _wait_for_others(self) -> None:
        """Let the main process wait up to WAIT_FOR_PEERS_S for the others to end, because the store ends with it."""
        if self.rank != 0 or self.heartbeat is None or self.store is None:
            return
        deadline = time.monotonic() + WAIT_FOR_PEERS_S
        peers = list(range(1, self.count))
        while time.monotonic() < deadline:
            peers = [r for r in peers if not (self.store.check([f"over/{r}"]) or self.store.check([f"failure/{r}"]))]
            if not peers:
                break
            time.sleep(POLL_SECONDS)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, on the CPU. A collective: every process must call it."""
        if self.count == 1:
            return values
        total = values.to(self.device)
        self.all_reduce(total)
        return total.cpu()


ALONE = Processes()


class ProcessLost(UserError):
    """Another process of the run has ended, so this one cannot continue."""


def format_first_line(error: BaseException) -> str:
    """Return an error's type and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def from_accelerator(accelerator: Any) -> Processes:
    """Return the processes that accelerate has set up.

    Raises UserError for unsupported accelerate configurations.
    """
    kind = accelerator.distributed_type.name
    # FSDP 2 means --shard_base, and its other settings are ignored.
    if kind not in PLAIN and fsdp_version() != 2:
        raise UserError(
            f"accelerate is configured for {kind}, but only plain data-parallel training is supported. Run `accelerate "
            f"config` again without {kind}, or use accelerate launch --multi_gpu. To shard a base model that does not "
            "fit one GPU, use --shard_base"
        )
    check_count(launched_count(), accelerator.num_processes)
    if accelerator.num_processes == 1:
        return Processes(device=accelerator.device)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    state = accelerator.state
    store, rank, count = join_rendezvous()
    store.set_timeout(timedelta(days=7))
    # The prefix keeps these keys apart from torch's own in the same store.
    prefixed = PrefixStore("lora", store)
    prefixed.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
    heartbeat = Heartbeat(PrefixStore("lora", store.clone()), rank, count)
    heartbeat.start()
    return Processes(
        rank=rank,
        count=count,
        local_rank=state.local_process_index,
        local_count=local_count(count),
        device=accelerator.device,
        store=prefixed,
        heartbeat=heartbeat,
    )


def join_rendezvous() -> tuple[Any, int, int]:
    """Join the rendezvous of all processes in this attempt; return (store, rank, count).

    A launcher that restarts processes (torchrun's `max_restarts`) may keep the store of the previous attempt with its
    entries. Each attempt therefore uses its own prefix.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(iter(rendezvous("env://")))
    return PrefixStore(f"attempt/{restart_count()}", store), rank, count


@cache
def register_rendezvous() -> str:
    """Register `join_rendezvous` as a rendezvous handler of torch, and return the URL that selects it."""
    from torch.distributed.rendezvous import register_rendezvous_handler

    def handler(url: str, **keywords: Any) -> Iterator[tuple[Any, int, int]]:
        yield join_rendezvous()

    register_rendezvous_handler("attempt", handler)  # type: ignore[no-untyped-call]
    return "attempt://"


def check_count(launched: int, count: int) -> None:
    """Raise UserError if accelerate connects fewer processes than the launcher started."""
    if launched == count:
        return
    if count == 1 and not torch.accelerator.is_available():
        reason = "torch sees no GPU, so the processes cannot connect"
        fix = "Run `nvidia-smi` and check that torch is built for this GPU"
    else:
        reason = "its configuration differs"
        fix = "Run `accelerate config` again"
    raise UserError(
        f"the launcher started {launched} processes, but accelerate connects only {count}: {reason}. Each would train "
        f"the whole run and write the same files. {fix}, or start one process: python3 instead of accelerate launch, "
        "or --num_processes 1"
    )


def local_count(count: int) -> int:
    """Return the number of processes on this machine, according to the launcher."""
    from accelerate.utils import get_int_from_env

    return int(get_int_from_env(["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"], count))
