"""What the launcher of the processes said, before anything is set up, and what must be set before torch is imported."""

import os
import time


def launched_rank() -> int:
    """The number of this process among those that were started; 0 for the main one."""
    return int(os.environ.get("RANK", "0"))


def launched_count() -> int:
    """How many processes were started, as the launcher says; 1 without one.

    Clusters set WORLD_SIZE for whole machines, where a script may well be started alone: torch's launcher sets
    LOCAL_RANK beside it.
    """
    names = ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]  # of MPI
    if "LOCAL_RANK" in os.environ:
        names.append("WORLD_SIZE")
    return max(int(os.environ.get(name, "1")) for name in names)


def restart_count() -> int:
    """How often the launcher has started the processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def fsdp_version() -> int | None:
    """Which FSDP `accelerate config` was told to use; None for none."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true", "yes", "on"):
        return None
    return int(os.environ.get("FSDP_VERSION", "1"))


# Waits of libgomp's threads for the next operation, in turns of a spin loop, before they sleep. On two idle cores the
# quickstart takes 0.16 s a step with 10,000 turns or more, 0.21 s with 3,000 and 0.37 s with none, for waking an idle
# core costs more than most operations of the toy model. With one core taken by another program, 10,000, 3,000 and no
# turns take 0.75, 0.43 and 0.28 s: a spinning thread keeps the core from the thread that it waits for.
IDLE_SPIN_COUNT = 10_000
BUSY_CORES = 0.5  # from here on another program competes for the cores
SAMPLED_S = 0.1


def set_openmp_wait_policy() -> None:
    """Let OpenMP's threads spin between operations on an idle machine and sleep on a busy one.

    Must be called before torch is imported. Keeps OMP_WAIT_POLICY and GOMP_SPINCOUNT if the user has set one. Does
    nothing where /proc/stat does not exist (macOS, Windows).
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ or not os.path.exists("/proc/stat"):
        return
    # The load average alone would count a program that has just ended, the sample alone a moment's work.
    if os.getloadavg()[0] >= BUSY_CORES and count_busy_cores(SAMPLED_S) >= BUSY_CORES:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = str(IDLE_SPIN_COUNT)


def count_busy_cores(seconds: float) -> float:
    """Sleep for `seconds`; return how many of this process' cores were busy meanwhile, on average."""
    before = _read_busy_ticks()
    time.sleep(seconds)
    return (_read_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def _read_busy_ticks() -> int:
    usable = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    busy = 0
    with open("/proc/stat", encoding="ascii") as lines:
        for name, *ticks in (line.split() for line in lines):
            if name in usable:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
                busy += user + nice + system + irq + softirq + steal
    return busy
