"""What the launcher of the processes said, before anything is set up, and what must be set before torch is imported."""

import os


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


def let_idle_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait, unless OMP_WAIT_POLICY says otherwise; to be called before torch is
    imported.

    By default they spin, and on a machine that does other work as well each operation waits for a thread that has lost
    its core: training on two such cores took 12.35 s a step, with sleeping threads 0.62 s. On an idle machine an
    operation takes about 10 microseconds longer.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
