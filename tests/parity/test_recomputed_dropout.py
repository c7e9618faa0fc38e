"""Recomputed blocks repeat every kind of dropout, and keep the states of random generators only for that."""

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from library.memory.activations import RecomputeFromMainMemory
from library.memory.blocks import (
    BlockRunner,
    draws_nothing,
    plain,
    recompute,
    recompute_without_randomness,
    run_library_blocks_with,
)
from library.options.machine.memory import MemoryOptions
from library.training.models.block_running import block_runner, repeats_itself
from networks.core.changes.ggpo import DEVIATION, Perturbed
from networks.core.protocol import AdoptedNetwork, adopt
from tests.tiny.sd import UNET
from tests.unit.networks.toy import Denoiser, randomize, toy_models

GGPO = {"ggpo_sigma": "0.1", "ggpo_beta": "0.1"}
QUIET: list[tuple[str, dict[str, str]]] = [
    (kind, {}) for kind in ("lora", "lokr", "loha", "oft", "oft_v2", "boft", "dylora")
]
DRAWING = [
    *((kind, {name: "0.5"}) for kind in ("lora", "lokr", "loha") for name in ("rank_dropout", "module_dropout")),
    *((kind, {"neuron_dropout": "0.5"}) for kind in ("lora", "lokr", "oft", "oft_v2")),
    ("lora", {"dora_wd": "True", "neuron_dropout": "0.5"}),
    ("lora", GGPO),
]


def adapted(kind: str, arguments: Mapping[str, str]) -> tuple[Denoiser, AdoptedNetwork]:
    denoiser = toy_models(3)[1].eval()
    network = adopt(
        importlib.import_module(f"networks.{kind}").create_network(1.0, 2, 2.0, None, [], denoiser, **arguments)
    )
    network.module.apply_to([], denoiser, False, True)
    network.prepare_gradients([], denoiser)
    network.start_epoch([], denoiser)
    network.start_optimizer_step(5, 0)
    randomize(network.module, 4)
    for change in network.module.changes():
        if isinstance(change, Perturbed):  # as after a step
            change.get_buffer(DEVIATION).fill_(0.1)
            change.is_perturbed = True
    return denoiser, network


def gradients(denoiser: Denoiser, network: AdoptedNetwork, runner: BlockRunner) -> list[Tensor]:
    run_library_blocks_with([denoiser.down[0], denoiser.mid, denoiser.up[0]], runner)
    torch.manual_seed(4)
    x = torch.randn(2, 6, 4, 4)
    loss = denoiser(x.requires_grad_()).square().mean()
    torch.manual_seed(5)  # as if something drew numbers between the passes
    found = torch.autograd.grad(loss, network.trainable_parameters(), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize(("kind", "arguments"), [*QUIET, *DRAWING], ids=str)
def test_a_recomputed_block_equals_a_plain_one_with_every_dropout(
    kind: str, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, network = adapted(kind, arguments)
    expected = gradients(denoiser, network, plain)
    assert any(gradient.any() for gradient in expected)
    repeats = not network.draws_numbers
    assert repeats == (not arguments)
    kept: list[object] = []
    keep_state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (kept.append(0), keep_state())[1])
    for memory in (
        MemoryOptions(gradient_checkpointing=True),
        MemoryOptions(gradient_checkpointing=True, cpu_offload_checkpointing=True),
    ):
        kept.clear()
        actual = gradients(denoiser, network, block_runner(memory, repeats_itself=repeats))
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(actual, expected, strict=True))
        assert bool(kept) != repeats


@pytest.mark.parametrize(("kind", "arguments"), DRAWING, ids=str)
def test_without_its_generators_state_a_dropout_would_differ(kind: str, arguments: dict[str, str]) -> None:
    denoiser, network = adapted(kind, arguments)
    wanted = gradients(denoiser, network, plain)
    try:
        actual = gradients(denoiser, network, recompute_without_randomness)
    except torch.utils.checkpoint.CheckpointError:  # a skipped module keeps other tensors
        return
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(actual, wanted, strict=True))


def test_foreign_networks_modules_and_training_mode_keep_the_states() -> None:
    network, unet = adapted("lora", {})[1], UNet2DConditionModel(**UNET).eval()
    foreign: Any = nn.Module()
    foreign.apply_to = foreign.prepare_optimizer_params = foreign.save_weights = lambda *_: None
    assert repeats_itself(unet, network) and not repeats_itself(unet, adopt(foreign))
    assert not draws_nothing(unet.train()) and draws_nothing(unet.eval())
    assert not draws_nothing(nn.Sequential(type("Noise", (nn.Module,), {"__module__": "somebody"})()).eval())


def test_offloaded_inputs_are_recomputed_by_the_given_runner() -> None:
    ran: list[BlockRunner] = []
    runner = RecomputeFromMainMemory(recompute=lambda *values: (ran.append(recompute), recompute(*values))[1])
    runner(nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert ran == [recompute]
