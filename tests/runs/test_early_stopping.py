"""Early stopping with two processes, which all stop at the same step as a single process."""

from pathlib import Path

import pytest

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from tests.ranks import Job, Rank, run_ranks
from tests.running import make_images
from tests.tiny.bases import BASES
from tests.tolerances import SUMS_OF_A_RUN

pytestmark = pytest.mark.nightly
WARMED = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "4"]  # so that the best loss comes early
RUNS = {"patience": ["--learning_rate", "2000", *WARMED, "--early_stop_patience", "2", "--max_train_steps", "9"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Rank]]]:
    """Return the folder and the logs of each run: "<name> 2" with two processes, "<name> 1" with one."""
    folder = tmp_path_factory.mktemp("runs")
    make_images(folder / "data" / "1_thing", 25, seed=71)
    (folder / "model").mkdir()
    words = [
        *BASES["flux"].build(folder / "model"), "--train_data_dir", str(folder / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_name", "mine", "--network_module",
        "networks.lora_flux", "--network_dim", "2", "--optimizer_type", "SGD", "--seed", "8", "--max_grad_norm", "0",
        "--max_data_loader_n_workers", "0", "--save_precision", "float", "--no_report", "--network_train_unet_only",
        "--validation_split", "0.5", "--validate_every_n_steps", "1",
    ]  # fmt: skip
    jobs = []
    for name, more in RUNS.items():
        for count, accumulated in ((2, "1"), (1, "2")):
            run_folder = folder / f"{name} {count}"
            run_folder.mkdir()
            command = [
                *words,
                *more,
                "--gradient_accumulation_steps",
                accumulated,
                "--output_dir",
                str(run_folder / "out"),
            ]
            jobs.append(Job(command, count, str(run_folder), "flux_train_network"))
    results = run_ranks(jobs, folder)
    return folder, {Path(job.folder).name: ranks for job, ranks in zip(jobs, results, strict=True)}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_stop_at_the_same_step_as_one(name: str, runs: tuple[Path, dict[str, list[Rank]]]) -> None:
    folder, ranks = runs
    for rank in (*ranks[f"{name} 2"], *ranks[f"{name} 1"]):
        assert rank.status == 0, rank.said
    two, single = (early_stopping_lines(ranks[f"{name} {count}"][0].said) for count in (2, 1))
    assert two == single and len(two) == 1
    files = {path.name: path for path in (folder / f"{name} 1" / "out").glob("*.safetensors")}
    assert files.keys() == {path.name for path in (folder / f"{name} 2" / "out").glob("*.safetensors")}
    for file, path in files.items():
        other = folder / f"{name} 2" / "out" / file
        assert read_metadata(path)["ss_steps"] == read_metadata(other)["ss_steps"]
        wanted, ours = load_state_dict(path), load_state_dict(other)
        for key, tensor in wanted.items():
            assert float((ours[key] - tensor).norm()) <= SUMS_OF_A_RUN * float(tensor.norm()), (file, key)


def early_stopping_lines(log: str) -> list[str]:
    """Return the log lines about early stopping."""
    lines = [line.partition("INFO")[2].strip() for line in log.splitlines()]
    return [line for line in lines if "ends after step" in line]
