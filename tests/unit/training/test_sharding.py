"""Options that conflict with --shard_base, and sharding requested by accelerate's configuration."""

import logging
from dataclasses import replace

import pytest

from library.options.train import TrainOptions
from library.processes.gradient_exchange import Order
from library.processes.process_group import Processes
from library.training.run.shard_base_checks import resolve_launched_values, sharding_values
from library.training.step.accumulation import Window

FOUR = Processes(1, 4, 1, 4)


def shared(processes: Processes, **values: object) -> dict[str, object]:
    options = TrainOptions().with_values({"shard_base": True, **values})
    return sharding_values(options.distributed, options.memory, options.network, options.compiling, processes)


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({"shard_group": 3}, FOUR, "4 processes cannot be divided into groups of 3.*--shard_group 2 or 4"),
        ({"shard_group": 8}, FOUR, "--shard_group 2 or 4"),
        ({}, Processes(0, 2, 0, 1), "each machine has one process.*--shard_group 2"),
        ({"blocks_to_swap": 4}, FOUR, "--shard_base and --blocks_to_swap"),
        ({"compile": True}, FOUR, "leave out --compile"),
        ({"torch_compile": True}, FOUR, "leave out --compile"),
        (
            {"base_weights": ["a.safetensors"], "network_module": "lycoris.kohya"},
            FOUR,
            r"--base_weights and --shard_base with --network_module lycoris\.kohya.*tools/merge_lora\.py first",
        ),
    ],
)
def test_unsupported_combinations_are_refused_with_a_fix(
    values: dict[str, object], processes: Processes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shared(processes, **values)


def test_the_processes_of_a_machine_share_the_base_by_default(caplog: pytest.LogCaptureFixture) -> None:
    assert shared(Processes(5, 8, 1, 4)) == {"shard_group": 4}
    assert shared(FOUR, shard_group=2) == {"shard_group": 2}
    with caplog.at_level(logging.WARNING):
        alone = shared(Processes())
    assert alone == {"shard_base": False, "shard_group": None} and "no effect with one process" in caplog.text


@pytest.mark.parametrize(
    ("is_on", "version", "expected"), [("true", "2", True), ("false", "2", False), ("no", "1", False)]
)
def test_fsdp2_in_accelerates_configuration_enables_sharding(
    monkeypatch: pytest.MonkeyPatch, is_on: str, version: str, expected: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", is_on)
    monkeypatch.setenv("FSDP_VERSION", version)
    assert resolve_launched_values(is_sharded=False) == ({"shard_base": True} if expected else {})


def test_fsdp1_in_accelerates_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"configured for FSDP 1.*FSDP version 2"):
        resolve_launched_values(is_sharded=False)


def test_a_rank_without_a_batch_gets_a_padding_batch() -> None:
    window = Window(3, 1, range(8, 13), True)
    shares = [window.share(rank, 4) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 1, 1, 1]
    assert [window.padding_batch(rank, 4) for rank in range(4)] == [None, 12, 12, 12]
    assert [replace(window, batch_indices=range(8, 12)).padding_batch(rank, 4) for rank in range(4)] == [None] * 4


def test_batch_orders_are_compared_within_a_group_only() -> None:
    order = Order(7, 2)
    order.require_same([7.0, 7.0, 3.0, 3.0], 1)
    with pytest.raises(RuntimeError, match="different orders"):
        order.require_same([7.0, 7.0, 3.0, 4.0], 2)
