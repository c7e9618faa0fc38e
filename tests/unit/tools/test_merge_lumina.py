"""tools/merge_lora.py on Lumina Image 2.0: the merged checkpoint computes what the model with the adapter did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.lumina.adapter_names import NAMES
from library.architectures.lumina.gemma import encode_gemma
from library.checkpoints.files import read_metadata
from library.models.adapter_views import view_both
from networks import lora_lumina
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.tiers import first_is_fast
from tests.tiny.lumina import build_tiny_lumina, inputs
from tests.tolerances import FLOAT32_DEEP
from tests.unit.architectures.lumina.test_load import open_tiny
from tests.unit.networks.toy import randomize
from tools import merge_lora

SEED = 33


def predictions(base: str, lora: Path | None = None, **arguments: str) -> list[Tensor]:
    """Return the outputs of the denoiser and of Gemma; `lora` is where a random adapter is saved, if any."""
    loader = open_tiny(["--pretrained_model_name_or_path", base])
    denoiser, encoders = loader.denoiser(), loader.text_encoders()
    if lora is not None:
        views: Any = view_both(encoders, denoiser)
        network = lora_lumina.create_network(1.0, 4, 2, None, *views, **arguments)
        randomize(network, 3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(0.3)
        network.apply_to(*views)
        network.eval()
        network.save_weights(str(lora), None, {})
    ids = torch.tensor([[2, 7, 9, 11]])
    with torch.no_grad():
        return [denoiser(*inputs(6, 10, (5, 2))), encode_gemma(encoders[0], ids, torch.ones_like(ids))]


def merge(base: str, lora: Path, save_to: Path) -> str:
    assert merge_lora.main(["--sd_model", base, "--models", str(lora), "--save_to", str(save_to)]) == 0
    return str(save_to)


@pytest.mark.parametrize("naming", first_is_fast(["kohya", "generic", "diffusers"]))
def test_the_merged_checkpoint_matches_the_adapted_model(tmp_path: Path, naming: Any) -> None:
    base = build_tiny_lumina(tmp_path, SEED, "whole")[1]
    expected = predictions(base, tmp_path / "lora.safetensors", split_qkv="True", embedder_dims="[2,2,2]")
    assert all((a - b).abs().max() > 0.01 for a, b in zip(predictions(base), expected, strict=True))
    file = read_adapter_file(tmp_path / "lora.safetensors")
    save_adapter_file(tmp_path / "renamed.safetensors", rename(file, NAMES, naming).file)
    merged = merge(base, tmp_path / "renamed.safetensors", tmp_path / "merged.safetensors")
    for actual, expected_output in zip(predictions(merged), expected, strict=True):
        torch.testing.assert_close(actual, expected_output, **FLOAT32_DEEP)
    assert read_metadata(Path(merged))["modelspec.architecture"] == "lumina-2"


def test_only_the_adapted_weights_change(tmp_path: Path) -> None:
    base = build_tiny_lumina(tmp_path, SEED, "whole")[1]
    predictions(base, tmp_path / "lora.safetensors", train_block_indices="1", train_blocks="transformer")
    merged = merge(base, tmp_path / "lora.safetensors", tmp_path / "merged.safetensors")
    before, after = load_file(base), load_file(merged)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    places = ("model.diffusion_model.layers.1.", "text_encoders.gemma2_2b.transformer.model.layers.")
    assert all(key.startswith(places) and "norm" not in key for key in changed)
    assert {place for place in places for key in changed if key.startswith(place)} == set(places)


def test_unusable_base_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build_tiny_lumina(tmp_path / "files", SEED, "whole")[1]
    predictions(base, tmp_path / "lora.safetensors")
    folder = build_tiny_lumina(tmp_path / "folder", SEED, "diffusers")[1]
    transformer = f"{folder}/transformer/diffusion_pytorch_model.safetensors"
    arguments = ["--models", str(tmp_path / "lora.safetensors"), "--save_to", str(tmp_path / "out.safetensors")]
    for model, message in (
        (folder, "for Lumina Image 2.0 merging supports only a file in the original layout"),
        (transformer, "this is a transformer in diffusers' layout"),
    ):
        assert merge_lora.main(["--sd_model", model, *arguments]) == 1
        assert message in capsys.readouterr().err
