"""The accelerate configurations that are supported, and how processes find each other."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from library.processes.gradient_exchange import exchange_gradients
from library.processes.process_group import PLAIN, Processes, from_accelerator


@pytest.mark.parametrize(
    "kind", [kind for kind in DistributedType if kind.name not in PLAIN], ids=lambda kind: kind.name
)
def test_a_configuration_that_shards_a_model_is_refused_with_the_reason(kind: DistributedType) -> None:
    accelerator = SimpleNamespace(distributed_type=kind, num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"configured for {kind.name}.*only plain data-parallel training"):
        from_accelerator(accelerator)


def test_fsdp_and_deepspeed_are_among_the_refused() -> None:
    assert not {"FSDP", "DEEPSPEED", "MEGATRON_LM"} & set(PLAIN)


@pytest.mark.parametrize(("has_gpu", "reason"), [(False, "torch sees no GPU"), (True, "its configuration differs")])
def test_processes_that_do_not_find_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, reason: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"started 2 processes, but accelerate connects only 1.*{reason}"):
        from_accelerator(accelerator)


def test_a_script_started_directly_on_a_cluster_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # of machines
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    assert from_accelerator(accelerator).count == 1


def test_one_process_needs_no_store() -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    processes = from_accelerator(accelerator)
    assert processes.is_main and processes.store is None
    processes.wait_for_all("nothing")
    assert processes.share("seed", "7") == "7"
    assert torch.equal(exchange_gradients(processes, [], torch.ones(2), 2, [True])[0], torch.ones(2))


class Board(dict[str, str]):
    """A stand-in for torch's store that threads share."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        while key not in self:
            pass
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_all_ranks_use_the_seed_of_rank_0_and_the_folder_of_their_machine() -> None:
    board = Board()

    def seen(rank: int) -> tuple[str, str]:
        processes = Processes(rank, 4, rank % 2, 2, store=board)
        shared = processes.share("seed", str(100 + rank)), processes.shared_folder("latents")
        processes.wait_for_all("the end")
        return shared

    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(seen, (3, 2, 1, 0)))
    assert {seed for seed, _ in shared} == {"100"}
    folders = [folder for _, folder in shared]
    assert folders[0] == folders[1] != folders[2] == folders[3]


def test_a_process_whose_data_differs_from_rank_0_raises_an_error() -> None:
    board = Board()
    Processes(0, 2, store=board).require_same("the dataset", "3 images")
    Processes(1, 2, store=board).require_same("the dataset", "3 images")
    with pytest.raises(ValueError, match=r"the dataset of process 1 differs.*4 images here, 3 images there"):
        Processes(1, 2, store=board).require_same("the dataset", "4 images")


def test_tables_of_all_processes_are_merged() -> None:
    board = Board()
    with ThreadPoolExecutor(2) as pool:
        tables = ({3: "three"}, {7: "seven", 3: "three"})
        futures = [pool.submit(Processes(rank, 2, store=board).merged, "pictures", tables[rank]) for rank in (0, 1)]
        assert [future.result() for future in futures] == [{3: "three", 7: "seven"}] * 2
    assert Processes().merged("pictures", {1: "one"}) == {1: "one"}
