"""A base model whose weights lie spread over two processes: the same gradients, half of the memory in each."""

import os
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.flux.model import Flux
from library.architectures.flux.targets import view
from library.models.loading import build_on_meta_device
from networks.core.protocol import open_network_module
from tests.parity.deep import DEEP
from tests.parity.modes import ADAPTERS, ALL_CODECS, RUNNERS
from tests.ranks import Job, Rank, run_ranks
from tests.tiny.flux import CONFIG, build_tiny_flux

CALLS = "tests.parity.spread_calls"
COUNT = 2
MODES = [
    "/".join(values)
    for _, *values in zip(range(max(len(ADAPTERS), len(ALL_CODECS))), cycle(DEEP), cycle(ALL_CODECS), cycle(RUNNERS),
                          cycle(ADAPTERS), strict=False)
]  # fmt: skip
JOBS = {"compared": MODES, "kept": [], "one_alone": [], "out_of_order": [], "peaks": []}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rank]]:
    """Return the results of both processes for each of the jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    told = {**JOBS, "merged": wide_flux(new_folder(folder / "model"))}
    jobs = [Job(words, COUNT, str(new_folder(folder / name)), call=f"{CALLS}:{name}") for name, words in told.items()]
    found = dict(zip(told, run_ranks(jobs, folder), strict=True))
    for name, ranks in found.items():
        assert [rank.status for rank in ranks] == [0] * COUNT, (name, [rank.said for rank in ranks])
    return found


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def wide_flux(folder: Path) -> list[str]:
    """A FLUX.1 model of 64 MB in float32, and an adapter of it that is to be merged; gives the arguments."""
    words = build_tiny_flux(folder, 75)
    model = build_on_meta_device(Flux, replace(CONFIG, width=256, mlp_width=1024, num_double=5, num_single=5))
    generator = torch.Generator().manual_seed(76)
    values = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}
    save_file(values, words[words.index("--pretrained_model_name_or_path") + 1])
    network = open_network_module("networks.lora_flux").create_network(1.0, 4, 1.0, None, *view([], model))
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in network.state_dict().items()}
    save_file(tensors, folder / "adapter.safetensors")
    return [*words, "--base_weights", str(folder / "adapter.safetensors"), "--mixed_precision", "no"]


def test_gradients_are_those_of_a_model_that_is_whole(given: dict[str, list[Rank]]) -> None:
    """Exactly, but for convolutions: contiguous weights of the reference go through other kernels in the backward."""
    assert {values.split("/")[0] for values in MODES} == set(DEEP)
    for rank in given["compared"]:
        for mode, (num_gradients, off) in zip(MODES, rank.gave, strict=True):
            assert num_gradients > 10
            assert off <= (1e-4 if mode.startswith("sd/") else 0.0), mode


def test_each_process_keeps_its_share_and_the_model_nothing(given: dict[str, list[Rank]]) -> None:
    for rank in given["kept"]:
        whole, own, left = rank.gave
        assert own * COUNT == whole > 10_000 and left == 0


def test_others_follow_one_that_computes_alone_also_where_it_fails(given: dict[str, list[Rank]]) -> None:
    first, second = (rank.gave for rank in given["one_alone"])
    assert first == [True] * 4 and second == [True]


def test_blocks_that_are_asked_for_in_different_orders_are_noticed_before_weights_move(
    given: dict[str, list[Rank]],
) -> None:
    for rank in given["out_of_order"]:
        alike, different = rank.gave
        assert alike == "" and "computed its blocks in different orders" in different


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured anew")
def test_no_process_ever_has_the_whole_model_while_it_is_read(given: dict[str, list[Rank]]) -> None:
    """The most is the share and a weight in three copies: as it is read, as bytes, and the share that is cut."""
    for rank in given["peaks"]:
        whole, sharded, plain = rank.gave
        one = whole / 12
        assert whole / COUNT * 0.9 < sharded < whole / COUNT + 3.5 * one < 0.8 * whole
        assert plain > 0.95 * whole


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured anew")
def test_files_are_merged_into_each_weight_before_it_is_spread(given: dict[str, list[Rank]]) -> None:
    """The most is the share and the largest weight in five copies: those of plain reading, the product and the sum."""
    for rank in given["merged"]:
        whole, largest, sharded, plain, is_same = rank.gave
        assert is_same
        rest = plain - whole  # what is not spread
        assert rest > -0.05 * whole, rank.gave
        assert whole / COUNT * 0.5 < sharded < whole / COUNT + max(0, rest) + 6 * largest < 0.8 * plain, rank.gave
