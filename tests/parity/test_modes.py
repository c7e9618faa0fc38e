"""Every memory mode, also with weights in main memory, gives exactly the adapter gradients of the plain mode."""

import importlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.architectures.flux.layers import view
from library.architectures.flux.model import Flux
from library.memory.activations import RecomputeFromMainMemory
from library.memory.blocks import (
    BlockRunner,
    draws_nothing,
    plain,
    recompute,
    recompute_without_randomness,
    run_library_blocks_with,
)
from library.memory.codecs.plain import Plain
from library.memory.frozen import freeze_layers, layers_in_blocks
from library.memory.offload import streamed
from library.memory.offload.ring import Ring
from library.memory.offload.streamed import stream
from library.models.loading import build_on_meta_device
from library.options.machine.memory import MemoryOptions
from library.training.models.block_running import block_runner, repeats_itself
from networks.core.changes.ggpo import DEVIATION, Perturbed
from networks.core.protocol import AdoptedNetwork, adopt, open_network_module
from tests.hiding import lazily
from tests.parity.deep import DEEP
from tests.parity.modes import ADAPTERS, ALL_CODECS, RUNNERS, Mode, gradients, pairs_of_modes, triples_of_modes
from tests.ranks import Job, Rank, run_ranks
from tests.tiny.flux import CONFIG, build_tiny_flux
from tests.tiny.sd import UNET
from tests.unit.networks.toy import Denoiser, randomize, toy_models

# Every memory mode gives exactly the adapter gradients of the plain mode.
# A weight format rounds the weights once, so its reference is the plain mode with the rounded weights. test_forms.py
# tests the rounding itself.

diffusers = lazily("diffusers")

PAIRS = pairs_of_modes()
DECODED: dict[tuple[str, str, str], list[torch.Tensor]] = {}


def reference(mode: Mode) -> list[torch.Tensor]:
    """Return the plain mode's gradients for the same base model, weights and adapter; cached, as modes share them."""
    key = mode.base, mode.form, mode.adapter
    if key not in DECODED:
        DECODED[key] = gradients(Mode(mode.base, mode.form, adapter=mode.adapter), is_decoded=True)
    return DECODED[key]


def check(mode: Mode) -> None:
    actual, wanted = gradients(mode), reference(mode)
    assert len(actual) == len(wanted) > 10
    assert all(bool(value.isfinite().all()) for value in actual)
    assert sum(bool(value.any()) for value in wanted) > len(wanted) / 2
    # Contiguous and channels-last weights use different convolution kernels, which sum in another order.
    tolerance = 1e-4 if mode.base == "sd" else 0.0
    for ours, theirs in zip(actual, wanted, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + (1e-9 if tolerance else 0)


@pytest.mark.parametrize("mode", PAIRS, ids=str)
def test_pairs_of_modes_train_like_the_plain_mode(mode: Mode) -> None:
    check(mode)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", [mode for mode in triples_of_modes() if mode not in PAIRS], ids=str)
def test_triples_of_modes_train_like_the_plain_mode(mode: Mode) -> None:
    check(mode)


MULTIPLIED = [
    Mode("flux", "int8_rotated", "streamed", "recompute", "dora"),
    Mode("sd", "int8", "streamed", "recompute_every_2", "lora"),
    Mode("anima", "fp8", "device", "recompute_from_main_memory", "lokr"),
]


@pytest.mark.parametrize("mode", MULTIPLIED, ids=str)
def test_8_bit_matmul_is_equal_in_every_mode_and_close_to_dequantised_matmul(mode: Mode) -> None:
    """The bounds allow for accumulated rounding of activations and gradients, a few percent in each of ten layers."""
    actual = gradients(mode, is_multiplied=True)
    plain = gradients(Mode(mode.base, mode.form, adapter=mode.adapter), is_multiplied=True)
    assert len(actual) == len(plain) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, plain, strict=True))
    decoded = reference(mode)
    off = [float((a - b).norm() / b.norm()) for a, b in zip(actual, decoded, strict=True) if b.any()]
    assert 1e-4 < sorted(off)[len(off) // 2] < 0.2


# Recomputed blocks repeat every kind of dropout, and keep the states of random generators only for that.

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


def recomputed_gradients(denoiser: Denoiser, network: AdoptedNetwork, runner: BlockRunner) -> list[Tensor]:
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
    expected = recomputed_gradients(denoiser, network, plain)
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
        actual = recomputed_gradients(denoiser, network, block_runner(memory, repeats_itself=repeats))
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(actual, expected, strict=True))
        assert bool(kept) != repeats


@pytest.mark.parametrize(("kind", "arguments"), DRAWING, ids=str)
def test_without_its_generators_state_a_dropout_would_differ(kind: str, arguments: dict[str, str]) -> None:
    denoiser, network = adapted(kind, arguments)
    wanted = recomputed_gradients(denoiser, network, plain)
    try:
        actual = recomputed_gradients(denoiser, network, recompute_without_randomness)
    except torch.utils.checkpoint.CheckpointError:  # a skipped module keeps other tensors
        return
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(actual, wanted, strict=True))


def test_foreign_networks_modules_and_training_mode_keep_the_states() -> None:
    network, unet = adapted("lora", {})[1], diffusers.UNet2DConditionModel(**UNET).eval()
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


# A base model sharded over two processes: equal gradients, half of the memory in each.

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


# The ring on complete models, with injected faults that must be detected and with truly concurrent copies.

CPU = torch.device("cpu")
NIGHTLY = pytest.param("recompute", marks=pytest.mark.nightly)


def skips_the_wait(ring: Ring) -> None:
    ring.streams.ready = lambda slot: None  # type: ignore[method-assign]


def waits_for_the_other_slot(ring: Ring) -> None:
    ready = ring.streams.ready
    ring.streams.ready = lambda slot: ready(1 - slot)  # type: ignore[method-assign]


def gives_the_other_slot(ring: Ring) -> None:
    need = ring.need
    ring.need = lambda block: (need(block), ring.streams.slots[1 - ring.held.index(block)])[1]  # type: ignore[method-assign]


def fills_the_slot_that_computes(ring: Ring) -> None:
    start = ring.streams.start
    ring.streams.start = lambda slot, master: start(slot if ring.now is None else 1 - slot, master)  # type: ignore[method-assign]


def copies_the_neighbour(ring: Ring) -> None:
    ring.masters = [*ring.masters[1:], ring.masters[0]]


def keeps_a_block_too_long(ring: Ring) -> None:
    """Simulate a handle that caches its first result."""
    first: dict[int, Tensor] = {}
    need = ring.need

    def remembered(block: int) -> Tensor:
        if block not in first:
            first[block] = need(block)
        return first[block]

    ring.need = remembered  # type: ignore[method-assign]


FAULTS: list[Callable[[Ring], None]] = [
    skips_the_wait,
    waits_for_the_other_slot,
    gives_the_other_slot,
    fills_the_slot_that_computes,
    copies_the_neighbour,
    keeps_a_block_too_long,
]


def differs(actual: list[Tensor], wanted: list[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("runner", ["plain", NIGHTLY])
@pytest.mark.parametrize("adapter", ["lora", "dora"])  # DoRA reads layer.weight
@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_a_fault_in_the_ring_changes_the_gradients(base: str, adapter: str, runner: str) -> None:
    mode = Mode(base, place="streamed", runner=runner, adapter=adapter)
    expected = gradients(mode)
    for fault in FAULTS:
        try:
            actual = gradients(mode, fault)
        except (AssertionError, RuntimeError, ValueError):
            continue  # detected even earlier, by the shapes of another block
        assert differs(actual, expected), fault.__name__


class ThreadStreams:
    """Slots filled by another thread after a random delay while blocks compute."""

    def __init__(self, num_slots: int, num_bytes: int, seed: int, longest: float = 2e-3) -> None:
        self.slots = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(num_slots)]
        self.filled = [threading.Event() for _ in self.slots]
        self.random = random.Random(seed)
        self.longest = longest  # longest time of a copy, in seconds
        self.copies: list[threading.Thread] = []

    def start(self, slot: int, master: Tensor) -> None:
        self.slots[slot].fill_(0xFF)
        self.filled[slot] = filled = threading.Event()
        before, delay = self.copies[-1:], self.random.random() * self.longest

        def copy() -> None:
            for thread in before:  # as on a stream, in submission order
                thread.join()
            time.sleep(delay)
            half = len(master) // 2
            self.slots[slot][:half].copy_(master[:half])
            time.sleep(delay / 2)
            self.slots[slot][half : len(master)].copy_(master[half:])
            filled.set()

        self.copies.append(threading.Thread(target=copy))
        self.copies[-1].start()

    def ready(self, slot: int) -> None:
        self.filled[slot].wait()


@pytest.mark.parametrize("seed", [61, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (62, 63))])
@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_concurrent_copies_do_not_change_results(base: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Mode(base, place="streamed", adapter="dora")
    alone = gradients(mode)

    def open_streams(masters: list[Tensor], *rest: object) -> ThreadStreams:
        return ThreadStreams(2, max(map(len, masters)), seed)

    monkeypatch.setattr(streamed, "open_streams", open_streams)
    assert not differs(gradients(mode), alone)


def test_missing_waits_for_concurrent_copies_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Mode("flux", place="streamed")
    alone = gradients(mode)

    def open_streams(masters: list[Tensor], *rest: object) -> ThreadStreams:
        return ThreadStreams(2, max(map(len, masters)), seed=66, longest=0.1)  # longer than a block computes

    monkeypatch.setattr(streamed, "open_streams", open_streams)
    assert differs(gradients(mode, skips_the_wait), alone)


@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_from_the_second_step_on_every_block_is_prefetched_before_its_use(base: str) -> None:
    deep = DEEP[base]
    model = deep.frozen(64)
    freeze_layers(Plain(), layers_in_blocks(model).values())
    stacks = deep.stacks(model)
    ring = stream(stacks, [len(stack) - 2 for stack in stacks], CPU)
    assert ring is not None
    model.apply(lambda module: [p.requires_grad_() for p in module.parameters() if isinstance(module, nn.LayerNorm)])
    missed = []
    for _ in range(4):
        latents, *rest = deep.values()
        output = model(latents.requires_grad_(), *rest)
        getattr(output, "sample", output).square().mean().backward()
        missed.append(ring.num_missed)
    assert missed[0] >= 1 and missed[1] == missed[2] == missed[3]
