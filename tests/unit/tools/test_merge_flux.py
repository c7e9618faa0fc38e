"""tools/merge_lora.py on FLUX.1: the merged checkpoint predicts what the model with the adapter did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.flux.adapter_names import NAMES
from library.architectures.flux.model import Flux
from library.checkpoints.files import read_metadata
from networks import lora_flux
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.tiers import first_is_fast
from tests.tiny.flux import build_tiny_flux, inputs, tiny_flux
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize
from tools import merge_lora

SEED = 31


def adapter(path: Path, **arguments: str) -> torch.Tensor:
    """Save an adapter with random weights and return the model's prediction with it."""
    model = tiny_flux(SEED)
    network = lora_flux.create_network(1.0, 4, 2, None, [], model, **arguments)
    randomize(network, 3)
    network.apply_to([], model, False, True)
    network.eval()
    network.save_weights(str(path), None, {})
    return prediction(model)


def prediction(model: Flux) -> torch.Tensor:
    output: torch.Tensor = model(*(value.detach() for value in inputs(6, 10)))
    return output


def merge(base: Path, lora: Path, folder: Path) -> dict[str, torch.Tensor]:
    save_to = folder / "merged.safetensors"
    assert merge_lora.main(["--sd_model", str(base), "--models", str(lora), "--save_to", str(save_to)]) == 0
    return load_file(save_to)


@pytest.mark.parametrize("naming", first_is_fast(["kohya", "diffusers"]))
@pytest.mark.parametrize("split", ["False", "True"])
def test_the_merged_transformer_matches_the_adapted_model(tmp_path: Path, naming: str, split: str) -> None:
    base = Path(build_tiny_flux(tmp_path, SEED)[1])
    expected = adapter(tmp_path / "lora.safetensors", split_qkv=split, in_dims="[2,2,2,2,2]")
    file = read_adapter_file(tmp_path / "lora.safetensors")
    save_adapter_file(tmp_path / "renamed.safetensors", rename(file, NAMES, naming).file)  # type: ignore[arg-type]
    tensors = merge(base, tmp_path / "renamed.safetensors", tmp_path)
    model = tiny_flux(SEED)
    model.load_state_dict(tensors)
    torch.testing.assert_close(prediction(model), expected, **FLOAT32_DEEP)
    assert read_metadata(tmp_path / "merged.safetensors")["modelspec.architecture"] == "flux-1-dev"


def test_in_a_file_of_all_parts_only_the_adapted_weights_change(tmp_path: Path) -> None:
    base = Path(build_tiny_flux(tmp_path, SEED, "whole")[1])
    adapter(tmp_path / "lora.safetensors", train_blocks="single")
    before, after = load_file(base), merge(base, tmp_path / "lora.safetensors", tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys()
    assert changed == {
        f"model.diffusion_model.single_blocks.{n}.{name}.weight"
        for n in range(2)
        for name in ("linear1", "linear2", "modulation.lin")
    }


def test_unusable_base_models_are_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "lora.safetensors")
    build_tiny_flux(tmp_path / "folder", SEED, "diffusers")
    arguments = ["--models", str(tmp_path / "lora.safetensors"), "--save_to", str(tmp_path / "out")]
    assert merge_lora.main(["--sd_model", str(tmp_path / "folder"), *arguments]) == 1
    assert "merging supports only a file in the original layout" in capsys.readouterr().err
