"""A base model sharded over two processes: equal gradients, half of the memory in each."""

import os
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.flux.layers import view
from library.architectures.flux.model import Flux
from library.models.loading import build_on_meta_device
from networks.core.protocol import open_network_module
from tests.parity.deep import DEEP
from tests.parity.modes import ADAPTERS, ALL_CODECS, RUNNERS
from tests.ranks import Job, Rank, run_ranks
from tests.tiny.flux import CONFIG, build_tiny_flux

CALLS = "tests.parity.sharded_calls"
COUNT = 2
MODES = [
    "/".join(values)
    for _, *values in zip(range(max(map(len, (ADAPTERS, ALL_CODECS, DEEP)))), cycle(DEEP), cycle(ALL_CODECS),
                          cycle(RUNNERS), cycle(ADAPTERS), strict=False)
]  # fmt: skip
JOBS = {"compared": MODES, "kept": [], "one_alone": [], "out_of_order": [], "peaks": []}


@pytest.fixture(scope="module")
def results_by_job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rank]]:
    """Return the results of both processes for each of the jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    calls = {**JOBS, "merged": build_wide_flux(new_folder(folder / "model"))}
    jobs = [Job(words, COUNT, str(new_folder(folder / name)), call=f"{CALLS}:{name}") for name, words in calls.items()]
    results = dict(zip(calls, run_ranks(jobs, folder), strict=True))
    for name, ranks in results.items():
        assert [rank.status for rank in ranks] == [0] * COUNT, (name, [rank.said for rank in ranks])
    return results


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def build_wide_flux(folder: Path) -> list[str]:
    """Build a FLUX.1 model of 64 MB in float32 and an adapter to merge; return the arguments."""
    words = build_tiny_flux(folder, 75)
    model = build_on_meta_device(Flux, replace(CONFIG, width=256, mlp_width=1024, num_double=5, num_single=5))
    generator = torch.Generator().manual_seed(76)
    values = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}
    save_file(values, words[words.index("--pretrained_model_name_or_path") + 1])
    network = open_network_module("networks.lora_flux").create_network(1.0, 4, 1.0, None, *view([], model))
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in network.state_dict().items()}
    save_file(tensors, folder / "adapter.safetensors")
    return [*words, "--base_weights", str(folder / "adapter.safetensors"), "--mixed_precision", "no"]


def test_gradients_equal_those_of_an_unsharded_model(results_by_job: dict[str, list[Rank]]) -> None:
    """Equality is exact except for convolutions, whose contiguous reference weights use other backward kernels."""
    assert {values.split("/")[0] for values in MODES} == set(DEEP)
    for rank in results_by_job["compared"]:
        for mode, (num_gradients, off) in zip(MODES, rank.gave, strict=True):
            assert num_gradients > 10
            assert off <= (1e-4 if mode.startswith("sd/") else 0.0), mode


def test_each_process_keeps_its_shard_and_the_model_keeps_nothing(results_by_job: dict[str, list[Rank]]) -> None:
    for rank in results_by_job["kept"]:
        total_bytes, shard_bytes, model_bytes = rank.gave
        assert shard_bytes * COUNT == total_bytes > 10_000 and model_bytes == 0


def test_other_processes_follow_one_that_computes_alone_even_if_it_fails(results_by_job: dict[str, list[Rank]]) -> None:
    first, second = (rank.gave for rank in results_by_job["one_alone"])
    assert first == [True] * 4 and second == [True]


def test_requests_for_different_blocks_are_detected_before_communication(results_by_job: dict[str, list[Rank]]) -> None:
    for rank in results_by_job["out_of_order"]:
        alike, different = rank.gave
        assert alike == "" and "computed its blocks in different orders" in different


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured anew")
def test_no_process_holds_the_full_model_while_reading(results_by_job: dict[str, list[Rank]]) -> None:
    """The peak is the shard plus three copies of a weight: as read, as bytes, and its shard."""
    for rank in results_by_job["peaks"]:
        total_bytes, sharded, plain = rank.gave
        weight_bytes = total_bytes / 12
        assert total_bytes / COUNT * 0.9 < sharded < total_bytes / COUNT + 3.5 * weight_bytes < 0.8 * total_bytes
        assert plain > 0.95 * total_bytes


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured anew")
def test_files_are_merged_into_each_weight_before_sharding(results_by_job: dict[str, list[Rank]]) -> None:
    """The peak is the shard plus five copies of the largest weight: three of plain reading, the product and the sum."""
    for rank in results_by_job["merged"]:
        total_bytes, largest, sharded, plain, is_same = rank.gave
        assert is_same
        rest = plain - total_bytes  # the unsharded remainder
        assert rest > -0.05 * total_bytes, rank.gave
        assert total_bytes / COUNT * 0.5 < sharded < total_bytes / COUNT + max(0, rest) + 6 * largest < 0.8 * plain, (
            rank.gave
        )
