"""tools/merge_lora.py and tools/convert_lora.py: the merged checkpoint computes what the model
with the adapter did, in every naming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import read_metadata
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.parity.test_dit_lora import DITS
from tests.tiers import first_is_fast
from tests.tiny.flux_2 import build_tiny_flux_2
from tests.tolerances import FLOAT32_DEEP
from tests.unit.architectures import test_dit_files
from tools import convert_lora, merge_lora

ARCHITECTURES = {
    (name, layout): architecture
    for name, case in DITS.items()
    for layout, architecture in case.dit.architectures.items()
}


@pytest.mark.parametrize("naming", first_is_fast(["kohya", "generic", "diffusers"]))
@pytest.mark.parametrize(("name", "layout"), ARCHITECTURES)
def test_the_merged_checkpoint_matches_the_adapted_model(tmp_path: Path, name: str, layout: Any, naming: Any) -> None:
    case, dit = DITS[name], DITS[name].dit
    is_dev = ARCHITECTURES[name, layout] == "Flux.2-dev"
    arguments = build_tiny_flux_2(tmp_path, 33, layout, is_dev=True) if is_dev else dit.build(tmp_path, 33, layout)
    denoiser = test_dit_files.open_tiny(name, arguments).denoiser()
    values, lora = dit.values(), tmp_path / "lora.safetensors"
    base, expected = save_trained(case.module, lora, dit.own[-1], denoiser, lambda: denoiser(*values))
    assert (expected - base).abs().max() > 0.01
    save_adapter_file(tmp_path / "renamed.safetensors", rename(read_adapter_file(lora), dit.names, naming).file)
    merged = tmp_path / "merged.safetensors"
    words = ["--sd_model", arguments[1], "--models", str(tmp_path / "renamed.safetensors"), "--save_to", str(merged)]
    assert merge_lora.main(words) == 0
    assert load_file(merged).keys() == load_file(arguments[1]).keys()
    actual = test_dit_files.open_tiny(name, [arguments[0], str(merged), *arguments[2:]]).denoiser()
    torch.testing.assert_close(actual(*values), expected, **FLOAT32_DEEP)
    assert read_metadata(merged)["modelspec.architecture"] == ARCHITECTURES[name, layout]


@pytest.mark.parametrize("name", DITS)
def test_a_merged_lora_has_the_names_of_a_trained_one(name: str, tmp_path: Path) -> None:
    """ComfyUI would ignore some layers under kohya's names."""
    path, to = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    metadata = {"ss_base_model_version": name}  # sizes do not identify a tiny model
    DITS[name].trained_file(DITS[name].module, path, {})
    save_file(load_file(path), path, metadata)
    words = ["--models", str(path), str(path), "--ratios", "0.75", "0.5", "--concat", "--save_to", str(to)]
    assert merge_lora.main(words) == 0
    trained, merged = read_adapter_file(path), read_adapter_file(to)
    assert load_file(to).keys() == load_file(path).keys()
    for module in trained.modules.values():
        torch.testing.assert_close(merged.modules[module.name].weight(), 1.25 * module.weight(), **FLOAT32_DEEP)


@pytest.mark.parametrize("name", DITS)
def test_the_command_converts_into_every_naming(name: str, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    DITS[name].trained_file(DITS[name].module, lora, {})
    if name == "flux_2":
        save_file(load_file(lora), lora, {"ss_base_model_version": "flux_2"})  # sizes do not identify a tiny model
    for naming, key in zip(("kohya", "generic", "diffusers"), DITS[name].dit.converted, strict=True):
        path = tmp_path / f"{naming}.safetensors"
        assert convert_lora.main(["--model", str(lora), "--save_to", str(path), "--to", naming]) == 0
        assert key in {name for module in read_adapter_file(path).modules.values() for name in module.keys.values()}
