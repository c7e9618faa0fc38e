"""Adapters that share one pass of the base model get the gradients of separate passes.

They differ by the rounding of sums over more rows. The factors are random, as zero factors would hide errors.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.memory.planner.steps import compute_peak_bytes
from library.options.train import TrainOptions
from library.processes import from_accelerator
from library.training.command_line.cli import parse
from library.training.loop import loop
from library.training.loop.stacked_step import backward_stacked
from library.training.models import frozen_base, opening
from library.training.models.block_running import choose_block_runner
from library.training.models.requests import RequestedRun
from library.training.planning.counting import count_run
from library.training.planning.meta_run import BatchShape
from library.training.run.prepare import prepare
from library.training.run_parts import Run
from library.training.saving.names import Names
from tests.running import SCRIPTS, make_images
from tests.tiny.bases import BASES
from tests.tolerances import SUMS_OF_A_PASS
from tests.unit.memory.planner.made_up import allocated_peak

CPU = torch.device("cpu")

KINDS: Mapping[str, dict[str, Any]] = {
    "LoRA": {"network_dim": 5, "network_alpha": 2},
    "DoRA": {"network_dim": 3, "network_args": ["dora_wd=True"]},
    "LoRA-FA": {"network_dim": 4, "network_module": "networks.lora_fa"},
    "DyLoRA": {"network_dim": 6, "network_module": "networks.dylora", "network_args": ["unit=2"]},
}
DROPPING = {"network_dropout": 0.3, "network_args": ["rank_dropout=0.2", "module_dropout=0.1"]}
OTHERS: Mapping[str, dict[str, Any]] = {
    "another seed and dropout": {"network_dim": 5, "seed": 23, **DROPPING},
    "DoRA with dropout": {"network_dim": 2, "network_dropout": 0.2, "network_args": ["dora_wd=True"]},
    "DoRA per output": {"network_dim": 3, "network_args": ["dora_wd=True", "wd_on_output=True"]},
    "LoHa": {"network_dim": 3, "network_module": "networks.loha"},
    "OFT": {"network_dim": 2, "network_module": "networks.oft_v2"},
    "GGPO": {"network_dim": 4, "network_args": ["ggpo_sigma=0.1", "ggpo_beta=0.1"]},
    "T-LoRA": {"network_dim": 4, "network_module": "networks.tlora"},
    "some layers": {"network_dim": 4, "network_args": ["exclude_patterns=.*(attn1|proj_in|q_proj).*"]},
}
CONVOLUTIONS: Mapping[str, dict[str, Any]] = {
    "convolutions": {"network_dim": 4, "network_args": ["conv_dim=2"]},
    "DoRA of convolutions": {"network_dim": 4, "network_args": ["conv_dim=3", "dora_wd=True", "train_norm=True"]},
    "LoRA-FA of convolutions": {"network_dim": 2, "network_module": "networks.lora_fa", "network_args": ["conv_dim=5"]},
    "attention alone": {"network_dim": 2},
}
MODES: Mapping[str, list[str]] = {
    "recomputed": ["--gradient_checkpointing"],
    "recomputed from main memory": ["--gradient_checkpointing", "--cpu_offload_checkpointing"],
    "streamed": ["--blocks_to_swap", "1", "--gradient_checkpointing"],
    "in four bits": ["--base_format", "nf4"],
    "in eight bits": ["--base_format", "int8_rotated", "--network_train_unet_only"],
    "cached texts": ["--cache_text_encoder_outputs", "--network_train_unet_only"],
}


def prepare_runs(
    folder: Path, name: str, adapters: Mapping[str, dict[str, Any]], *more: str, size: str = "64"
) -> list[Run]:
    """Prepare adapters with random factors on one tiny base model."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    base = BASES[name]
    make_images(folder / "data" / "1_thing", 2, seed=73)
    words = [
        *base.build(folder / "model"), "--train_data_dir", str(folder / "data"), "--caption_extension", ".txt",
        "--resolution", size, "--train_batch_size", "2", "--output_dir", str(folder / "out"), "--network_module",
        "networks.lora", "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip
    spec = SCRIPTS[base.script]
    options: TrainOptions = spec.options.from_args(parse(importlib.import_module(base.script).setup_parser(), words))
    accelerator = opening.open_accelerator(options.precision.mixed_precision, options.trackers)
    arch, processes = spec.build(options), from_accelerator(accelerator)
    each = [options.with_values({"output_name": label, **values}) for label, values in adapters.items()]
    requested = RequestedRun.resolve(each, arch)
    plan = opening.open_data_plan(options, arch, requested.text, 21, 1)
    wanted = [
        replace(request, names=Names.build(request.options.saving), seed=values.get("seed", 21), label=label)
        for request, (label, values) in zip(requested.adapters, adapters.items(), strict=True)
    ]
    ready = prepare(replace(requested, adapters=wanted), 21, plan, accelerator, processes)
    runs, generator = [prepared.run for prepared in ready], torch.Generator().manual_seed(74)
    for run in runs:
        run.context.network.start_epoch(*run.context.models.network_view)
        for tensor in run.context.network.trainable_parameters():
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    return runs


def take_gradients(run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the gradients by name and clear them."""
    for name, parameter in run.context.network.module.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad
            parameter.grad = None


def assert_joint_equals_separate(runs: list[Run], tolerance: float) -> None:
    """Assert equal losses and gradients for a window of two batches, together and for each adapter alone."""
    (batch,) = runs[0].batches.iterate_epoch(1, [0], lambda index: 0, 0, False)
    together = [backward_stacked(runs, batch, number, 2, 3) for number in (6, 7)]
    joint_gradients = [dict(take_gradients(run)) for run in runs]
    for i, (run, gradients) in enumerate(zip(runs, joint_gradients, strict=True)):
        alone = [loop.backward(run, batch, number, 2, 3) for number in (6, 7)]
        torch.testing.assert_close(torch.stack([one[i] for one in together]), torch.stack(alone), rtol=1e-5, atol=0)
        wanted = dict(take_gradients(run))
        assert gradients.keys() == wanted.keys() and wanted
        size = torch.stack([tensor.norm() for tensor in wanted.values()]).norm()
        for name, gradient in wanted.items():
            off = (gradients[name] - gradient).norm() / (gradient.norm() + 1e-3 * size)
            assert off < tolerance, (run.label, name, float(off))
    losses = [float(one) for one in together[0]]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize(
    "name", [name if name == "flux" else pytest.param(name, marks=pytest.mark.nightly) for name in BASES]
)
def test_every_adapter_kind_gets_equal_gradients_on_every_base_model(
    fresh_process: None, tmp_path: Path, name: str
) -> None:
    assert_joint_equals_separate(prepare_runs(tmp_path, name, KINDS), SUMS_OF_A_PASS)


def test_convolution_and_norm_adapters_get_equal_gradients(fresh_process: None, tmp_path: Path) -> None:
    assert_joint_equals_separate(
        prepare_runs(tmp_path, "sd", CONVOLUTIONS, "--network_train_unet_only"), SUMS_OF_A_PASS
    )


def test_kinds_and_dropouts_that_run_in_sequence_get_equal_gradients(fresh_process: None, tmp_path: Path) -> None:
    runs = prepare_runs(tmp_path, "anima", OTHERS, "--gradient_checkpointing")
    assert_joint_equals_separate(runs, SUMS_OF_A_PASS)
    assert runs[0].multiplexer is not None and runs[0].multiplexer.share_stacked(range(len(runs))) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.nightly
def test_memory_modes_give_equal_gradients(
    fresh_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(frozen_base, "NUM_STAYING", 1)  # of a tiny model's two blocks
    adapters = {**KINDS, "dropout": {"network_dim": 5, **DROPPING}}
    assert_joint_equals_separate(prepare_runs(tmp_path, "sd3", adapters, *MODES[mode]), SUMS_OF_A_PASS)


@pytest.mark.parametrize(
    "recomputes",
    [pytest.param(False, id="keeps all", marks=pytest.mark.nightly), pytest.param(True, id="recomputes all")],
)
def test_the_counted_shared_step_matches_the_allocator(fresh_process: None, tmp_path: Path, recomputes: bool) -> None:
    more = ["--cache_latents", "--network_train_unet_only", *(["--gradient_checkpointing"] if recomputes else [])]
    two = {label: KINDS[label] for label in ("LoRA", "DoRA")}
    runs = prepare_runs(tmp_path, "flux", two, *more, size="256,192")
    context, (batch,) = runs[0].context, runs[0].batches.iterate_epoch(1, [0], lambda index: 0, 0, False)
    shape = BatchShape(2, 256, 192)
    adapters = [run.options for run in runs]
    requested = RequestedRun.resolve(adapters, context.arch)
    counted = count_run(requested, shape, CPU).step
    alone = count_run(replace(requested, adapters=requested.adapters[:1]), shape, CPU).step
    options, networks = adapters[0], [run.context.network for run in runs]
    choose_block_runner(options.memory, options.compiling, False, context.arch, context.models, networks)
    for caption in batch.captions:
        context.captions([caption])
        for run in runs:
            run.context.captions([caption])
    real = allocated_peak(lambda: backward_stacked(runs, batch, 0, 1, 0))
    planned = compute_peak_bytes(list(counted.timeline.expand(lambda i: recomputes, lambda i: True)))
    assert planned == pytest.approx(real, rel=0.03)
    sizes = [sum(p.numel() * 4 for p in run.context.network.trainable_parameters()) for run in runs]
    assert (alone.gradient_bytes, counted.gradient_bytes) == (sizes[0], sum(sizes))
    assert counted.optimizer.state > alone.optimizer.state
