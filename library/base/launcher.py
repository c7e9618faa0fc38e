"""The launcher's environment variables, and variables that must be set before torch is imported."""

import os
import platform

DRIVER = "LORA_SWEEP_PROCESS"  # the variable in which --sweep gives its runs its process


def launched_rank() -> int:
    """Return the global rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_count() -> int:
    """Return the number of processes that were launched; 1 without a launcher.

    WORLD_SIZE counts only if LOCAL_RANK is set, as torch's launcher does: clusters set WORLD_SIZE even for a script
    that is started alone.
    """
    names = ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]  # set by MPI launchers
    if "LOCAL_RANK" in os.environ:
        names.append("WORLD_SIZE")
    return max(int(os.environ.get(name, "1")) for name in names)


def restart_count() -> int:
    """Return how often the launcher has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def fsdp_version() -> int | None:
    """Return the FSDP version chosen in `accelerate config`, or None."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true", "yes", "on"):
        return None
    return int(os.environ.get("FSDP_VERSION", "1"))


def prepare_for_torch() -> None:
    """Set the environment variables of OpenMP and CUDA's allocator. Must be called before torch is imported."""
    set_openmp_wait_policy()
    set_cuda_allocator()


def set_cuda_allocator() -> None:
    """Let CUDA's allocator extend its segments, which avoids fragmentation by batches of many sizes.

    Keeps a setting of the user. Native Linux only: Windows does not support it, and under WSL2 the first allocation
    fails (pytorch#192330).
    """
    if platform.system() != "Linux" or "microsoft" in platform.release().lower():
        return
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        # torch 2.9 ignores PYTORCH_ALLOC_CONF for this setting (pytorch#183387); later versions read both names.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


# Iterations of the spin loop in which libgomp's threads wait for the next operation before they sleep. On two idle
# cores a quickstart step takes 0.16 s with 10,000 or more, 0.21 s with 3,000 and 0.37 s with none, because waking an
# idle core costs more than most operations of the toy model. With one core taken by another program, 10,000, 3,000 and
# none take 0.75, 0.43 and 0.28 s: a spinning thread keeps the core from the thread that it waits for.
IDLE_SPIN_COUNT = 10_000
BUSY_CORES = 0.5  # load from which the machine counts as busy with another program
SAMPLED_S = 0.1


def set_openmp_wait_policy() -> None:
    """Let OpenMP's threads spin between operations on an idle machine and sleep on a busy one.

    Keeps OMP_WAIT_POLICY and GOMP_SPINCOUNT if the user has set one. Does nothing where /proc/stat does not exist
    (macOS, Windows).
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ or not os.path.exists("/proc/stat"):
        return
    # The load average still counts a program that has just ended; the sample may catch a momentary load. Require both.
    if os.getloadavg()[0] >= BUSY_CORES and count_busy_cores(SAMPLED_S) >= BUSY_CORES:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = str(IDLE_SPIN_COUNT)


def count_busy_cores(seconds: float) -> float:
    """Measure for `seconds`, and return how many of this process's cores were busy on average."""
    import psutil

    percents = psutil.cpu_percent(seconds, percpu=True)
    return float(sum(percents[core] for core in os.sched_getaffinity(0) if core < len(percents))) / 100
