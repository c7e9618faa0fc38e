"""A VAE of FLUX.1 with a prefix."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.flux import build_tiny_flux
from tests.unit.architectures.test_dit_files import open_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux(tmp_path_factory.mktemp("flux"), 3)


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_a_vae_with_a_prefix_loads_the_same(tiny: list[str], tmp_path: Path, prefix: str) -> None:
    index = tiny.index("--ae") + 1
    path = tmp_path / "ae.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(tiny[index]).items()}, path)
    actual = open_tiny("flux", [*tiny[:index], str(path), *tiny[index + 1 :]]).vae().state_dict()
    expected = open_tiny("flux", tiny).vae().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
