"""Adapters merged into the base model, and trained beside one, against merging into a loaded model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.memory.frozen import freeze_layers, layers_in_blocks
from library.memory.planner.prediction import MemoryMode, apply_mode, pass_work
from library.options.train import TrainOptions
from library.processes.process_group import ALONE
from library.protocols import Architecture
from library.training.evaluation.preview_weights import without_training_adapter
from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import attach_training_adapter
from library.training.models.frozen_base import resolve_base
from library.training.models.frozen_models import load_frozen
from library.training.models.network import create
from library.training.models.step_context import step_context
from library.training.models.weight_formats import BaseFormats
from library.training.planning.meta_run import BatchShape, fake_batch
from library.training.step.context import Models, StepContext
from library.training.step.losses import loss_of
from library.types import Batch
from networks.core.protocol import adopt, open_network_module
from tests.parity.test_counting import count_options, planned_peak
from tests.parity.tiny_models import opened_with
from tests.tiny.bases import BASES
from tests.weight_formats import CODECS

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

# Files that together have all contents that files can have.
KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    name: base.merged or (base.module, {}) for name, base in BASES.items()
}
FAST = ("sd", "flux")


def write_adapter_file(
    path: Path, arch: Architecture, seed: int, module: str, arguments: Mapping[str, str], has_text_encoder: bool = True
) -> str:
    """Write a file for the base model with random parameters."""
    encoders = arch.load.text_encoders()
    view = arch.view(encoders, arch.load.denoiser())
    network = open_network_module(module).create_network(1.0, 4, 2.0, None, *view, **arguments)
    network.apply_to(*view, has_text_encoder, True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    network.save_weights(str(path), None, {})
    return str(path)


def merge_afterwards(options: TrainOptions, arch: Architecture, compute: Compute, reader: str) -> Models:
    """Return the unquantised models with the files merged one after the other."""
    encoders, denoiser = arch.load.text_encoders(), arch.load.denoiser()
    models = Models(denoiser, encoders, None, arch.view(encoders, denoiser))
    for file, multiplier in zip(options.network.base_weights or (), (1.0, 0.5), strict=True):
        network, weights = open_network_module(reader).create_network_from_weights(
            multiplier, file, None, *models.network_view, for_inference=True
        )
        adopt(network).merge_to(*models.network_view, weights, compute.dtype, compute.device)
    return models


def open_with_files(name: str, folder: Path, *more: str) -> tuple[TrainOptions, Architecture, str]:
    """Open a base model with two files to merge, the second at half strength; return the reading module too."""
    module, arguments = KINDS[name]
    words = [*BASES[name].build(folder), *more]
    _, arch = opened_with(name, words)
    files = [write_adapter_file(folder / f"{seed}.safetensors", arch, seed, module, arguments) for seed in (1, 2)]
    merged = ["--base_weights", *files, "--base_weights_multiplier", "1.0", "0.5"]
    return *opened_with(name, [*words, *merged]), module


def assert_same(actual: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = actual.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) and ours[name].stride() == value.stride(), name


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.nightly) for n in KINDS])
@pytest.mark.parametrize("form", ["", "int8"])
def test_merging_while_reading_equals_merging_afterwards(name: str, form: str, tmp_path: Path) -> None:
    words = ["--base_format", form] if form else []
    options, arch, reader = open_with_files(name, tmp_path, "--mixed_precision", "bf16", *words)
    compute = Compute.build(options.precision, torch.device("cpu"))
    wanted = merge_afterwards(options, arch, compute, reader)
    actual = load_frozen(
        options.network,
        BaseFormats.load(options.precision).denoiser,
        arch,
        arch.load.text_encoders(),
        None,
        compute,
        open_network_module(reader),
    )
    plain = arch.load.denoiser()
    changed = [n for n, value in wanted.denoiser.state_dict().items() if not torch.equal(value, plain.state_dict()[n])]
    assert len(changed) > 10
    if form:
        freeze_layers(CODECS[form], layers_in_blocks(wanted.denoiser).values())
    assert_same(actual.denoiser, wanted.denoiser)
    for ours, theirs in zip(actual.text_encoders, wanted.text_encoders, strict=True):
        assert_same(ours, theirs)


# --training_adapter beside the trained adapter, compared with merging the file and with the base model alone.

CPU = torch.device("cpu")
SHAPE = BatchShape(2, 64, 64)
FAST_BESIDE = ("flux", "zimage")
CLOSE = 1e-6  # of the loss, and of the largest gradient
ROUNDED = 3e-6  # of the largest gradient of a U-Net, whose group norms amplify what float32 rounds


def open_with(name: str, model: list[str], *more: str) -> tuple[TrainOptions, Architecture]:
    return opened_with(name, [*model, "--network_train_unet_only", "--mixed_precision", "no", *more])


def write_denoiser_file(name: str, model: list[str], path: Path) -> str:
    """Write an adapter of the denoiser's layers at a strength that changes the loss."""
    _, arch = open_with(name, model)
    torch.manual_seed(2)
    return write_adapter_file(path, arch, 1, BASES[name].module, {}, has_text_encoder=False)


def open_context(options: TrainOptions, arch: Architecture) -> StepContext:
    """Return what a step computes with, the trained adapter with random parameters included."""
    compute, formats = Compute.build(options.precision, CPU), BaseFormats.load(options.precision)
    assert options.network.network_module is not None
    module = open_network_module(options.network.network_module)
    encoders = arch.load.text_encoders()
    models = load_frozen(options.network, formats.denoiser, arch, encoders, None, compute, module)
    resolve_base(options.precision, formats, options.memory, arch, models, compute, ALONE)
    models = attach_training_adapter(options.network, arch, models, CPU)
    models.denoiser.requires_grad_(False)
    network = adopt(create(options.network, module, models))
    network.apply_to(*models.network_view, False, True)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.module.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return step_context(False, 1, arch, 7, LoadedModels(models, None, None), network, compute)


def make_batch(arch: Architecture) -> Batch:
    batch = fake_batch(arch, SHAPE, None, has_latents=True)
    assert batch.latents_BCHW is not None
    latents_BCHW = torch.randn(batch.latents_BCHW.shape, generator=torch.Generator().manual_seed(4))
    return replace(batch, captions=["a cat", "two dogs"], latents_BCHW=latents_BCHW)


def loss_and_gradients(context: StepContext, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    context.network.module.zero_grad()
    loss = loss_of(context, batch, 0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in context.network.module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST_BESIDE else pytest.mark.nightly) for n in BASES]
)
def test_loss_and_gradients_equal_those_of_the_merged_file(name: str, tmp_path: Path) -> None:
    model = BASES[name].build(tmp_path)
    file = write_denoiser_file(name, model, tmp_path / "beside.safetensors")
    (plain, _), (merged, wanted), (beside, actual) = (
        loss_and_gradients(open_context(options, arch), make_batch(arch))
        for options, arch in (
            open_with(name, model, *more) for more in ((), ("--base_weights", file), ("--training_adapter", file))
        )
    )
    assert abs(plain - merged) > 10 * CLOSE * merged
    assert abs(beside - merged) < CLOSE * merged
    assert len(wanted) > 10 and actual.keys() == wanted.keys()
    share = ROUNDED if name in ("sd", "sd2", "sdxl") else CLOSE
    atol = share * max(float(gradient.abs().max()) for gradient in wanted.values())
    for key, gradient in wanted.items():
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("form", [*CODECS])
def test_every_base_format_is_trained_with_it_and_drawn_without_it(form: str, tmp_path: Path) -> None:
    model = BASES["zimage"].build(tmp_path)
    file = write_denoiser_file("zimage", model, tmp_path / "beside.safetensors")
    words = ("--base_format", form)
    options, arch = open_with("zimage", model, *words, "--training_adapter", f"{file}:0.5")
    context, batch = open_context(options, arch), make_batch(arch)
    alone, _ = loss_and_gradients(open_context(*open_with("zimage", model, *words)), batch)
    beside, _ = loss_and_gradients(context, batch)
    assert abs(beside - alone) > 1e-4 * alone
    with without_training_adapter(context.models.training_adapter):
        assert torch.equal(loss_and_gradients(context, batch)[0], alone)
    assert torch.equal(loss_and_gradients(context, batch)[0], beside)


def test_the_planner_counts_its_memory_and_its_operations(tmp_path: Path) -> None:
    model = BASES["zimage"].build(tmp_path)
    file = write_denoiser_file("zimage", model, tmp_path / "beside.safetensors")
    alone, beside = (
        count_options(*open_with("zimage", model, "--cache_latents", *more), SHAPE)
        for more in ((), ("--training_adapter", file))
    )
    # It has the layers and ranks of the trained adapter.
    assert beside.step.adapter_bytes == 2 * alone.step.adapter_bytes
    assert beside.step.gradient_bytes == alone.step.gradient_bytes
    assert planned_peak(beside, False) > planned_peak(alone, False)
    operations = [sum(work.flops for work in pass_work(apply_mode(c.step, MemoryMode()))) for c in (alone, beside)]
    assert operations[1] > operations[0]
