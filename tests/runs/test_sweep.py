"""Adapters that train together over one base model are those that train alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from library.checkpoints.files import load_state_dict
from tests.running import Finished, make_pictures
from tests.runs.bases import BASES
from tests.tolerances import SUMS_OF_A_RUN

Train = Callable[..., Finished]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Three steps of FLUX.1 and its text encoder; SGD, whose steps are as large as the gradients are."""
    make_pictures(tmp_path / "data" / "1_thing", 5, seed=71)
    return [
        *BASES["flux"].build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--output_name",
        "mine", "--network_module", "networks.lora_flux", "--network_alpha", "2", "--learning_rate", "0.5",
        "--optimizer_type", "SGD", "--seed", "8", "--max_data_loader_n_workers", "0", "--max_train_steps", "3",
        "--save_precision", "float", "--no_report", "--max_grad_norm", "0.2",
    ]  # fmt: skip


def assert_same_files(one: Path, other: Path) -> None:
    """Equal up to how sums over more rows are rounded, and something was learned."""
    found, wanted = load_state_dict(one), load_state_dict(other)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        off = (found[key] - tensor).norm() / tensor.norm().clamp(min=1e-30)
        assert off < SUMS_OF_A_RUN, (key, float(off))
    assert max(float(tensor.abs().max()) for key, tensor in wanted.items() if "lora_up" in key) > 1e-3


def test_every_combination_gives_the_file_of_its_run_alone(train: Train, words: list[str], tmp_path: Path) -> None:
    """Ranks, rates, dropout and seeds: the seed is that of an adapter, so it alone does not change the batches."""
    together = ["--sweep", "network_dim=2,3", "learning_rate=0.5,1", "network_dropout=0.2,0"]
    done = train([*words, *together], "flux_train_network")
    assert done.status == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert names == {
        f"mine-dim{dim}-lr{lr}-dropout{drop}.safetensors"
        for dim in "23"
        for lr in ("0.5", "1")
        for drop in ("0.2", "0")
    }
    for dim, rate, drop in (("2", "0.5", "0.2"), ("3", "1", "0"), ("3", "0.5", "0.2")):
        own = ["--network_dim", dim, "--learning_rate", rate, "--network_dropout", drop, "--output_name", "alone"]
        assert train([*words, *own], "flux_train_network").status == 0
        name = f"mine-dim{dim}-lr{rate}-dropout{drop}.safetensors"
        assert_same_files(tmp_path / "out" / name, tmp_path / "out" / "alone.safetensors")
