"""Measure speed and communication of several processes: images per second of 2 and 4 processes against one, the share
of a step spent on communication, and the bytes sent over the network against theory.

The script's own loop trains the tiny models, with one thread per process and gloo as the backend. The bytes are counted
on the loopback interface of a network namespace that only the benchmark uses (Linux, as root); elsewhere that column
shows "-".

    python benchmarks/scaling.py
    python benchmarks/scaling.py --models flux --counts 1 2 --steps 20
"""

import argparse
import ctypes
import fcntl
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.ranks import Job, run_ranks  # noqa: E402

NEW_NETWORK = 0x40000000  # CLONE_NEWNET
GET_FLAGS, SET_FLAGS, IS_UP = 0x8913, 0x8914, 1
WARM_UP = 4  # steps that fill caches and optimizer states
BATCH = 4


def open_network() -> bool:
    """Move this process and its children into their own network namespace. Return False where that is impossible."""
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(NEW_NETWORK) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(one, GET_FLAGS, request), 16)
        fcntl.ioctl(one, SET_FLAGS, struct.pack("16sh14x", b"lo", flags | IS_UP))
    return True


def bytes_sent() -> int:
    """Return the number of bytes sent over the loopback interface, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).partition(":")[2].split()[8])


# In each process


class Watch:
    """A recorder of the time spent on communication, and of each step."""

    def __init__(self) -> None:
        self.exchanging = 0.0
        self.steps: list[tuple[float, ...]] = []  # (seconds, in communication, bytes sent by all ranks, bytes gathered)
        self.last: tuple[float, ...] | None = None
        self.fetched = self.buffer_bytes = 0

    def timed(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return plain(*arguments, **named)
            finally:
                self.exchanging += time.perf_counter() - began

        return call

    def after_step(self) -> None:
        sent = bytes_sent() if sys.platform == "linux" else 0
        now = time.perf_counter(), self.exchanging, float(sent), float(self.fetched)
        if self.last is not None:
            self.steps.append(tuple(after - before for after, before in zip(now, self.last, strict=True)))
        self.last = now


def train(script: str, *arguments: str) -> dict[str, Any]:
    """Train as one rank of torch's process group and return the measurements."""
    import importlib

    from library.memory.offload import sharded
    from library.processes import Processes
    from library.training.command_line.main import main as run
    from tests.running import SCRIPTS

    watch, processes_type, streams = Watch(), Processes, sharded.GatheredStreams
    exchange, start = processes_type.exchange, streams.start

    def watched_exchange(self: Processes, parameters: Any, *others: Any) -> Any:
        watch.buffer_bytes = 4 * sum(parameter.numel() for parameter in parameters)
        found = watch.timed(exchange)(self, parameters, *others)
        watch.after_step()
        return found

    def watched_start(self: sharded.GatheredStreams, slot: int, master: sharded.ShardedBlock) -> None:
        watch.fetched += sum(parameter.numel() for parameter in master.parameters())
        start(self, slot, master)

    processes_type.exchange = watched_exchange  # type: ignore[method-assign]
    streams.start = watch.timed(watched_start)  # type: ignore[method-assign]
    streams.ready = watch.timed(streams.ready)  # type: ignore[method-assign]
    spec = SCRIPTS[script]
    assert run(importlib.import_module(script).setup_parser(), spec.options, spec.build, arguments) == 0
    kept = watch.steps[WARM_UP:]
    medians = [statistics.median(column) for column in zip(*kept, strict=True)]
    return {"medians": medians, "buffer_bytes": watch.buffer_bytes}


# In the parent process


def command_line(model: str, folder: Path, num_steps: int) -> tuple[str, list[str]]:
    """Return the script and its options."""
    from tests.running import make_images
    from tests.tiny.bases import BASES

    base = BASES[model]
    (folder / model).mkdir()
    words = [*base.build(folder / model), "--network_module", base.module, "--network_dim", "16", "--no_report"]
    if not (folder / "data").exists():
        make_images(folder / "data" / "40_thing", 8)
    words += ["--train_data_dir", str(folder / "data"), "--resolution", "64", "--train_batch_size", str(BATCH)]
    words += ["--max_train_steps", str(num_steps + WARM_UP + 2), "--cache_latents", "--network_train_unet_only"]
    words += ["--output_dir", str(folder / "out"), "--seed", "3", "--max_data_loader_n_workers", "0"]
    return base.script, [*words, "--caption_extension", ".txt"]


def measure_ways(model: str, ways: Sequence[tuple[int, bool]], num_steps: int) -> list[list[dict[str, Any]]]:
    """Return the measurements of every rank, for each (number of processes, is base model sharded)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script, words = command_line(model, folder, num_steps)
        jobs = []
        for number, (count, is_sharded) in enumerate(ways):
            (folder / str(number)).mkdir()
            more = ["--shard_base"] if is_sharded else []
            jobs.append(Job([script, *words, *more], count, str(folder / str(number)), call="benchmarks.scaling:train"))
        found = run_ranks(jobs, folder, timeout=1800)
    for ranks in found:
        assert all(rank.status == 0 for rank in ranks), ranks[0].said
    return [[rank.gave for rank in ranks] for ranks in found]


def expected_bytes(buffer_bytes: int, fetched: float, count: int) -> float:
    """Return the bytes that all ranks together must send in a step.

    Ring all-reduce: each rank sends 2 (N - 1) / N times the buffer. All-gather of a sharded block: each rank sends its
    shard to all others.
    """
    return (count - 1) * (2 * buffer_bytes + fetched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd", "flux"])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4], help="numbers of processes; 1 comes first")
    parser.add_argument("--steps", type=int, default=30)
    wanted = parser.parse_args()
    is_counted = open_network()
    ways = [
        (count, is_sharded) for count in wanted.counts for is_sharded in ((False,) if count == 1 else (False, True))
    ]
    print(f"{os.cpu_count()} processors, {BATCH} images per process, medians of {wanted.steps} steps")
    print("model | processes | base | s/step | images/s vs. one | communication | MB sent | MB in theory | ratio")
    for model in wanted.models:
        rate = None
        for (count, is_sharded), ranks in zip(ways, measure_ways(model, ways, wanted.steps), strict=True):
            seconds, exchanging, sent, fetched = (
                statistics.mean(column) for column in zip(*(r["medians"] for r in ranks), strict=True)
            )
            rate = rate or BATCH / seconds
            theory = expected_bytes(ranks[0]["buffer_bytes"], fetched, count)
            columns = [model, count, "sharded" if is_sharded else "whole", f"{seconds:.3f}"]
            columns += [f"{count * BATCH / seconds / rate:.2f}", f"{exchanging / seconds:.0%}"]
            columns += [f"{sent / 1e6:.2f}" if is_counted else "-", f"{theory / 1e6:.2f}"]
            print(" | ".join(map(str, columns)), "|", f"{sent / theory:.2f}" if is_counted and theory else "-")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
