"""--base_weights merged while the base model is read, compared with merging into a loaded model."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from library.memory.frozen import freeze_layers, layers_in_blocks
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.models.compute import Compute
from library.training.models.frozen_models import load_frozen
from library.training.models.weight_formats import BaseFormats
from library.training.step.context import Models
from networks.core.protocol import adopt, open_network_module
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
