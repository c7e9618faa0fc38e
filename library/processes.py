"""The processes of a run: who computes what, and how their gradients become one.

`accelerate launch --num_processes N` starts N of them. Every step averages a window of batches (see plan.py); each
process computes its share of the window, and the gradients are added up in one flat buffer. So N processes are one
process that accumulates N times as many batches: the same batches, noise, steps and learning rates.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.heartbeat import Heartbeat, Store
from library.launcher import fsdp_version, launched_count, restart_count
from library.temporary_folders import Kind, make_temporary_folder

logger = logging.getLogger(__name__)

SHORT_SECONDS, POLL_SECONDS = 0.005, 0.1  # from one look at the store to the next
SAY_AFTER_SECONDS = 60.0
LOOK_FOR_S = 5  # for the reason of a process that has ended
HEARD_WITHIN_S = 6.0  # the others look every two seconds, and those that wait for a word every second
OF_CONNECTIONS = ("onnection closed", "onnection reset", "onnection refused", "roken pipe", "NCCL", "timed out")
PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine
    local_count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Store | None = None  # None where there is only one process
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_rank == 0

    @property
    def machine(self) -> int:
        """The number of this machine, where each runs equally many processes."""
        return self.rank // self.local_count

    @property
    def num_machines(self) -> int:
        """Machines of the run."""
        return -(-self.count // self.local_count)

    def share(self, what: str, text: str) -> str:
        """The main process's text, for all; the others wait until it is there."""
        if self.store is None:
            return text
        if self.is_main:
            self.store.set(what, text)
        return self._wait_for(what)

    def merged(self, what: str, own: Mapping[int, str]) -> dict[int, str]:
        """The tables of all processes in one, for all; each is to be called for `what` once."""
        if self.store is None:
            return dict(own)
        self.store.set(f"{what} {self.rank}", json.dumps(list(own.items())))
        return {
            int(number): str(text)
            for rank in range(self.count)
            for number, text in json.loads(self._wait_for(f"{what} {rank}"))
        }

    def share_seed(self, seed: int) -> int:
        """The main process's seed, for all."""
        return int(self.share("seed", str(seed)))

    def require_same(self, what: str, own: str) -> None:
        """Raise UserError where this process has another `what` than the main one, both described in words."""
        main = self.share(f"same {what}", own)
        if own != main:
            raise UserError(
                f"{what} of process {self.rank} is not that of the main process: {own} here, {main} there; every "
                "machine needs the same"
            )

    def shared_folder(self, kind: Kind, parent: str | None = None) -> str:
        """A temporary folder for all processes of this machine, in `parent`, gone when the run ends."""
        key = f"folder/{kind}/{self.machine}"
        if self.is_local_main:
            folder = make_temporary_folder(kind, parent)
            if self.store is None:
                return folder
            self.store.set(key, folder)
        return self._wait_for(key)

    def wait_for_all(self, what: str) -> None:
        """Return once every process has come to `what`, each of which has its own name.

        No collective runs meanwhile, so there is no time limit: one process may have hours of work more than another.
        Raises ProcessLost where one is gone.
        """
        if self.store is None:
            return
        self.store.set(f"{what}/{self.rank}", "1")
        missing = [f"{what}/{rank}" for rank in range(self.count)]
        said_at = time.monotonic()
        while missing := [key for key in missing if not self.store.check([key])]:
            self.require_all()
            time.sleep(POLL_SECONDS)
            if time.monotonic() - said_at > SAY_AFTER_SECONDS:
                said_at = time.monotonic()
                logger.info("%s: waiting for %d of %d processes", what, len(missing), self.count)

    def exchange(
        self,
        parameters: Sequence[nn.Parameter],
        losses: Tensor,
        num_losses: int,
        stops: bool,
        order: "Order | None" = None,
    ) -> tuple[Tensor, bool]:
        """Add up the gradients of all processes; gives the losses of all, and whether one wants to stop.

        `losses` are those of this process's share of `num_losses` batches, in order; the result has all of them in
        order. One buffer and one reduction carry everything, in float32. A gradient that no process has stays None.
        Raises RuntimeError where processes that have to do something in one `order` did not.
        """
        if self.count == 1:
            return losses, stops
        shared = torch.zeros(num_losses, device=self.device)
        shared[self.rank :: self.count] = losses.to(self.device, torch.float32)
        has_gradient = [p.grad is not None for p in parameters]
        orders = [0.0] * (0 if order is None else self.count)
        if order is not None:
            orders[self.rank] = float(order.digest)
        flags = torch.tensor([*has_gradient, stops, *orders], dtype=torch.float32, device=self.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1).to(self.device, torch.float32) for g in gradients] + [flags, shared])
        self._all_reduce(flat)
        sizes = [p.numel() for p in parameters]
        *sums, flags, shared = torch.split(flat, [*sizes, len(flags), num_losses])
        told = flags.tolist()
        if order is not None:
            order.require_same(told[len(parameters) + 1 :], self.rank)
        is_there = [number > 0 for number in told[: len(parameters) + 1]]
        for parameter, total, is_used in zip(parameters, sums, is_there, strict=False):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if is_used else None
        return shared.clone(), is_there[-1]

    def _all_reduce(self, values: Tensor) -> None:
        """Add up a tensor of all processes in place. Raises ProcessLost where one of them does not take part."""
        try:
            torch.distributed.all_reduce(values)
        except RuntimeError as error:
            raise ProcessLost(f"{self.lost()} ({first_line(error)})") from error

    def lost(self) -> str:
        """Which of the other processes has ended, and why, as far as that can be told; this one ends because of it."""
        return self._found(LOOK_FOR_S) or "the connection to another process broke; its own lines say why"

    def _found(self, num_looks: int) -> str | None:
        """What has become of another process, looked for once a second; None where nothing is known."""
        if self.heartbeat is None:
            return None
        for number in range(num_looks):
            if (found := self.heartbeat.lost or self.heartbeat.find()) is not None:
                self.heartbeat.is_told = True
                return found
            if number + 1 < num_looks:
                time.sleep(1)
        return None

    @property
    def is_lost(self) -> bool:
        """Whether another process is known to be gone: nothing that needs all of them will be any more."""
        return self.heartbeat is not None and self.heartbeat.lost is not None

    def require_all(self) -> None:
        """Raise ProcessLost where another process is known to be gone."""
        if self.heartbeat is not None and self.heartbeat.lost is not None:
            self.heartbeat.is_told = True
            raise ProcessLost(self.heartbeat.lost)

    def _wait_for(self, key: str) -> str:
        """What another process says, once it does. Raises ProcessLost where one is gone."""
        assert self.store is not None
        pause = SHORT_SECONDS
        while not self.store.check([key]):
            self.require_all()
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return self.store.get(key).decode()

    @contextmanager
    def taking_part(self, *signals: type[Exception]) -> Iterator[None]:
        """What a process does among the others, from its first word to them to its last; see `failures_told`."""
        try:
            with self.failures_told(*signals):
                yield
        finally:
            if self.heartbeat is not None:
                self.heartbeat.stop()

    @contextmanager
    def failures_told(self, *signals: type[Exception]) -> Iterator[None]:
        """Tell the other processes why this one ends.

        Raises ProcessLost in place of what comes of another one's end: a broken connection, and the `signals` by which
        a launcher ends all others then.
        """
        try:
            yield
        except Exception as error:
            if self.store is None or isinstance(error, ProcessLost):
                raise
            is_broken = isinstance(error, torch.distributed.DistError) or (
                isinstance(error, RuntimeError) and any(word in str(error) for word in OF_CONNECTIONS)
            )
            if (is_broken or isinstance(error, signals)) and (found := self._found(LOOK_FOR_S if is_broken else 1)):
                raise ProcessLost(f"{found} ({first_line(error)})") from error
            with suppress(RuntimeError):  # the store may be gone
                if not self.store.check([f"failure/{self.rank}"]):
                    self.store.set(f"failure/{self.rank}", first_line(error))
                    if not isinstance(error, signals):
                        self._let_others_hear()
            raise

    def _let_others_hear(self) -> None:
        """Stay until the others have ended too, a few seconds at most: the main process takes what was said with it."""
        if self.rank != 0 or self.heartbeat is None or self.store is None:
            return
        end = time.monotonic() + HEARD_WITHIN_S
        others = list(range(1, self.count))
        while others and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            others = [r for r in others if not (self.store.check([f"over/{r}"]) or self.store.check([f"failure/{r}"]))]

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of the tensors of all processes, each of which must call it; on the CPU."""
        if self.count == 1:
            return values
        total = values.to(self.device)
        self._all_reduce(total)
        return total.cpu()


ALONE = Processes()


@dataclass(frozen=True)
class Order:
    """What a process did, in order, that the others of its group have to do alike."""

    digest: int  # below 2**24, which float32 holds exactly
    group_size: int

    def require_same(self, digests: Sequence[float], rank: int) -> None:
        """Raise RuntimeError where the group of `rank` has more than one of the digests of all processes."""
        first = rank // self.group_size * self.group_size
        if len(set(digests[first : first + self.group_size])) > 1:
            raise RuntimeError(
                "processes that share the base model (--shard_base) computed its blocks in different orders, so this "
                "step has wrong weights; it moves nothing"
            )


class ProcessLost(UserError):
    """Another process of the run has ended, so that this one cannot go on."""


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def of_accelerator(accelerator: Any) -> Processes:
    """The processes that accelerate set up.

    Raises UserError for its configurations that this suite does not train with.
    """
    kind = accelerator.distributed_type.name
    if kind not in PLAIN and fsdp_version() != 2:
        raise UserError(
            f"accelerate is configured for {kind}, which spreads a model over processes; the base model is frozen here "
            "and the adapter is small, so plain data-parallel training is what works: run `accelerate config` again "
            f"without {kind}, or give --multi_gpu to accelerate launch. A base model that does not fit one card is "
            "spread over several with --shard_base"
        )
    check_count(launched_count(), accelerator.num_processes)
    if accelerator.num_processes == 1:
        return Processes(device=accelerator.device)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    state = accelerator.state
    store, rank, count = meet()
    store.set_timeout(timedelta(days=7))
    shared = PrefixStore("lora", store)
    shared.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
    heartbeat = Heartbeat(PrefixStore("lora", store.clone()), rank, count)
    heartbeat.start()
    return Processes(
        rank=rank,
        count=count,
        local_rank=state.local_process_index,
        local_count=local_count(count),
        device=accelerator.device,
        store=shared,
        heartbeat=heartbeat,
    )


def meet() -> tuple[Any, int, int]:
    """(store, rank, count) of this attempt, where all processes find each other.

    A launcher that starts them anew (--max_restarts) may keep the store of the attempt before, with what was said in
    it: each attempt has names of its own.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(iter(rendezvous("env://")))
    return PrefixStore(f"attempt/{restart_count()}", store), rank, count


@cache
def way_to_meet() -> str:
    """What torch has to be told so that its processes `meet` too."""
    from torch.distributed.rendezvous import register_rendezvous_handler

    def found(url: str, **given: Any) -> Iterator[tuple[Any, int, int]]:
        yield meet()

    register_rendezvous_handler("attempt", found)  # type: ignore[no-untyped-call]
    return "attempt://"


def check_count(launched: int, count: int) -> None:
    """Raise UserError where the launcher started other processes than accelerate brings together."""
    if launched == count:
        return
    if count == 1 and not torch.accelerator.is_available():
        why = "torch sees no graphics card here, so they do not find each other"
        way_out = "look what `nvidia-smi` says and whether this is torch's build for the card, or start one process"
    else:
        why = "its configuration says otherwise"
        way_out = "run `accelerate config` again, or start one process"
    raise UserError(
        f"the launcher started {launched} processes, but for accelerate {count} of them belong together: {why}. Each "
        f"would train the whole run and write the same files; {way_out}: python3 instead of accelerate launch, or "
        "--num_processes 1"
    )


def local_count(count: int) -> int:
    """Processes on this machine, as the launcher says."""
    from accelerate.utils import get_int_from_env

    return int(get_int_from_env(["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"], count))
