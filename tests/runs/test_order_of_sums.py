"""Two processes and one that accumulates differ in the order in which they add up the same gradients.

Up factors that hardly move show it most. After a few steps of SGD on the toy base those of the attention in its middle
have norms of 1e-5, sums of gradients that nearly cancel, and differ by some 1e-6 of that, where others agree to 1e-7. A
process whose kernels share their sums out to two threads differs from itself by more.
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
    """The files of runs of four steps, each of four batches or fewer."""
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
        ("ordered", 1, "4", f"{CALLS}:added_as_by_two"),
        ("threads", 1, "4", f"{CALLS}:with_two_threads"),
        ("pair", 2, "1", None),
        ("single", 1, "2", None),
    ):
        (folder / name).mkdir()
        told = [*words, "--gradient_accumulation_steps", accumulation, "--output_dir", str(folder / name / "out")]
        jobs.append(Job(told, count, str(folder / name), call=call))
    for job, ranks in zip(jobs, run_ranks(jobs, folder), strict=True):
        for rank in ranks:
            assert rank.status == 0 and rank.gave in (None, 0), (job.folder, rank.said[-3000:])
    return {Path(job.folder).name: load_state_dict(Path(job.folder) / "out" / "mine.safetensors") for job in jobs}


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {k: float((found[k] - t).norm() / t.norm().clamp(min=1e-30)) for k, t in wanted.items()}


def test_one_process_that_adds_in_the_order_of_two_is_the_run_of_two(weights: dict[str, dict[str, Tensor]]) -> None:
    """Bit for bit, with windows of three and four batches: nothing else is different."""
    assert weights["ordered"].keys() == weights["two"].keys()
    assert all(torch.equal(weights["ordered"][key], tensor) for key, tensor in weights["two"].items())


def test_with_a_batch_each_there_is_one_order(weights: dict[str, dict[str, Tensor]]) -> None:
    assert all(torch.equal(weights["pair"][key], tensor) for key, tensor in weights["single"].items())


def test_another_order_changes_factors_as_little_as_other_threads_do(weights: dict[str, dict[str, Tensor]]) -> None:
    order, threads = (off(weights[name], weights["one"]) for name in ("two", "threads"))
    assert 0 < max(order.values()) <= ORDER
    assert 0 < max(threads.values()) <= ORDER
