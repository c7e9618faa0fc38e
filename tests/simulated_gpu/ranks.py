"""tests.ranks with a simulated GPU for each process: `python -m tests.simulated_gpu.ranks <jobs.json>`."""

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from tests import ranks
from tests.killing import run_module
from tests.ranks import Job, Rank
from tests.simulated_gpu.device import Settings, Simulation, insert

NUM_GPUS = 2


def run_ranks(jobs: Sequence[Job], folder: Path, timeout: float = 300) -> list[list[Rank]]:
    """Run the jobs as tests.ranks does; `gave` of each process has its faults and waits."""
    results = run_module("tests.simulated_gpu.ranks", jobs, folder, timeout)
    return [[Rank(**rank) for rank in ranks] for ranks in results]


def main() -> None:
    """Insert the GPUs before anything else, then run as the forking process."""
    simulation, start = insert(Settings(num_gpus=NUM_GPUS)), ranks.start

    def started(job: Job) -> int:
        os.environ["ACCELERATE_USE_CPU"] = "false"
        status = start(job)
        write_records(simulation, job)
        return status

    ranks.start = started
    ranks.main()


def write_records(simulation: Simulation, job: Job) -> None:
    """Write the faults and waits of this process."""
    gc.collect()
    torch.cuda.synchronize()
    records = {"faults": list(map(str, simulation.faults())), "waits": simulation.waits()}
    (Path(job.folder) / f"gave_{os.environ['RANK']}").write_text(json.dumps(records))


if __name__ == "__main__":
    main()
