"""Two processes and one that accumulates differ in the order in which they add up the same gradients.

Up factors that barely change show it most. After a few SGD steps on the toy base, those of the middle attention
have norms of 1e-5, as their gradients nearly cancel, and differ by about 1e-6 of that; others agree to 1e-7. A
process whose kernels split sums between two threads differs from itself by more.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from tests.ranks import Job, run_ranks
from tests.running import ROOT, make_images

pytestmark = pytest.mark.nightly
CALLS = "tests.runs.order_calls"
ORDER = 5e-5  # of the norm of any factor: what the order of four gradients (6e-6) or of sums in kernels (1e-5) changes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Return the weights of runs of four steps with up to four batches each."""
    folder = tmp_path_factory.mktemp("runs")
    make_images(folder / "data" / "2_thing", 10, seed=71)
    words = [
        "--pretrained_model_name_or_path", str(ROOT / "configs" / "quickstart" / "toy_base"), "--train_data_dir",
        str(folder / "data"), "--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2",
        "--output_name", "mine", "--network_module", "networks.lora", "--network_dim", "4", "--optimizer_type", "SGD",
        "--learning_rate", "0.3", "--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0",
        "--no_report", "--save_precision", "float", "--validation_split", "0.3",
    ]  # fmt: skip
    jobs = []
    for name, count, accumulation, call in (
        ("two", 2, "2", None),
        ("one", 1, "4", None),
        ("ordered", 1, "4", f"{CALLS}:train_in_order_of_two"),
        ("threads", 1, "4", f"{CALLS}:train_with_two_threads"),
        ("pair", 2, "1", None),
        ("single", 1, "2", None),
    ):
        (folder / name).mkdir()
        command = [*words, "--gradient_accumulation_steps", accumulation, "--output_dir", str(folder / name / "out")]
        jobs.append(Job(command, count, str(folder / name), call=call))
    for job, ranks in zip(jobs, run_ranks(jobs, folder), strict=True):
        for rank in ranks:
            assert rank.status == 0 and rank.gave in (None, 0), (job.folder, rank.said[-3000:])
    return {Path(job.folder).name: load_state_dict(Path(job.folder) / "out" / "mine.safetensors") for job in jobs}


def relative_differences(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {k: float((actual[k] - t).norm() / t.norm().clamp(min=1e-30)) for k, t in wanted.items()}


def test_one_process_that_sums_in_the_order_of_two_equals_two_processes(weights: dict[str, dict[str, Tensor]]) -> None:
    """Equality is bit for bit with windows of three and four batches, so nothing else differs."""
    assert weights["ordered"].keys() == weights["two"].keys()
    assert all(torch.equal(weights["ordered"][key], tensor) for key, tensor in weights["two"].items())


def test_with_one_batch_per_process_the_order_does_not_matter(weights: dict[str, dict[str, Tensor]]) -> None:
    assert all(torch.equal(weights["pair"][key], tensor) for key, tensor in weights["single"].items())


def test_another_order_changes_factors_no_more_than_another_thread_count(weights: dict[str, dict[str, Tensor]]) -> None:
    order, threads = (relative_differences(weights[name], weights["one"]) for name in ("two", "threads"))
    assert 0 < max(order.values()) <= ORDER
    assert 0 < max(threads.values()) <= ORDER
