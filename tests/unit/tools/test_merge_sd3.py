"""tools/merge_lora.py on Stable Diffusion 3: the merged checkpoint computes what the model with the adapter did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.sd3.adapter_names import NAMES
from library.architectures.sd3.load import DENOISER_PREFIX, TEXT_PREFIXES, open_loader
from library.architectures.sd3.targets import view
from library.checkpoints.files import read_metadata
from networks import lora_sd3
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.parity.test_sd3_adapters_in_diffusers import answers, inputs
from tests.tiny.sd3 import build_tiny_sd3
from tests.unit.architectures.sd3.test_load import options_of
from tests.unit.networks.toy import randomize
from tools import merge_lora

pytestmark = pytest.mark.slow

SEED = 33


def predictions(base: Path, lora: Path | None = None, **arguments: str) -> list[Tensor]:
    """Return the outputs of the denoiser and both CLIPs; `lora` is where a random adapter is saved, if any."""
    loader, config = open_loader(options_of(base))
    denoiser, encoders = loader.denoiser(), loader.text_encoders()
    if lora is not None:
        views: Any = view(encoders, denoiser)
        network = lora_sd3.create_network(1.0, 4, 2, None, *views, **arguments)
        randomize(network, 3)
        network.apply_to(*views)
        network.eval()
        network.save_weights(str(lora), None, {})
    return answers(denoiser, encoders, inputs(config), is_ours=True)


def merge(base: Path, lora: Path, save_to: Path) -> Path:
    assert merge_lora.main(["--sd_model", str(base), "--models", str(lora), "--save_to", str(save_to)]) == 0
    return save_to


@pytest.mark.parametrize("naming", ["kohya", "generic", "diffusers"])
@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
def test_the_merged_checkpoint_matches_the_adapted_model(tmp_path: Path, name: str, naming: Any) -> None:
    base = build_tiny_sd3(tmp_path, SEED, name)
    expected = predictions(base, tmp_path / "lora.safetensors", split_qkv="True", emb_dims="[2,2,2,2,2,2]")
    assert all((a - b).abs().max() > 0.01 for a, b in zip(predictions(base), expected, strict=True))
    file = read_adapter_file(tmp_path / "lora.safetensors")
    save_adapter_file(tmp_path / "renamed.safetensors", rename(file, NAMES, naming).file)
    merged = merge(base, tmp_path / "renamed.safetensors", tmp_path / "merged.safetensors")
    for actual, expected_output in zip(predictions(merged), expected, strict=True):
        # Relative to the largest value: the random adapter is strong, and rounding errors grow without query norms.
        assert (actual - expected_output).abs().max() < 1e-4 * expected_output.abs().max()
    version = {"sd3-medium": "medium", "sd3.5-medium": "5-medium"}[name]
    assert read_metadata(merged)["modelspec.architecture"] == f"stable-diffusion-3-{version}"


def test_only_the_adapted_weights_change(tmp_path: Path) -> None:
    base = build_tiny_sd3(tmp_path, SEED)
    predictions(base, tmp_path / "lora.safetensors", train_block_indices="1")
    merged = merge(base, tmp_path / "lora.safetensors", tmp_path / "merged.safetensors")
    before, after = load_file(base), load_file(merged)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    places = (f"{DENOISER_PREFIX}joint_blocks.1.", TEXT_PREFIXES["clip_l"], TEXT_PREFIXES["clip_g"])
    assert all(key.startswith(places) and key.endswith(".weight") for key in changed)
    assert {place for place in places for key in changed if key.startswith(place)} == set(places)


def test_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build_tiny_sd3(tmp_path / "model", SEED)
    predictions(base, tmp_path / "lora.safetensors")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    arguments = ["--models", str(tmp_path / "lora.safetensors"), "--save_to", str(tmp_path / "out")]
    assert merge_lora.main(["--sd_model", str(tmp_path / "model"), *arguments]) == 1
    assert "for SD3 use a single file in the original layout" in capsys.readouterr().err
