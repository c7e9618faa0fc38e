"""tools/merge_lora.py on Anima: the merged checkpoint computes what the model with the adapter did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.anima.adapter_names import NAMES
from library.checkpoints.files import read_metadata
from networks import lora_anima
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.tiers import first_is_fast
from tests.tiny.anima import build_tiny_anima, inputs
from tests.tolerances import FLOAT32_DEEP
from tests.unit.architectures.anima.test_load import open_tiny
from tests.unit.networks.toy import randomize
from tools import merge_lora

SEED = 33


def prediction(base: list[str], lora: Path | None = None, **arguments: str) -> Tensor:
    """Return the denoiser's prediction; if `lora` is given, with a random adapter that is saved there."""
    denoiser = open_tiny(base).denoiser()
    if lora is not None:
        network = lora_anima.create_network(1.0, 4, 2, None, [], denoiser, **arguments)
        randomize(network, 3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(0.3)
        network.apply_to([], denoiser, False, True)
        network.eval()
        network.save_weights(str(lora), None, {})
    with torch.no_grad():
        output: Tensor = denoiser(*inputs(6, 10))
    return output


def merge(base: str, lora: Path, save_to: Path) -> str:
    assert merge_lora.main(["--sd_model", base, "--models", str(lora), "--save_to", str(save_to)]) == 0
    return str(save_to)


@pytest.mark.parametrize(
    ("naming", "prefix"), first_is_fast([("kohya", "net."), ("generic", ""), ("diffusers", "net.")])
)
def test_the_merged_checkpoint_matches_the_adapted_model(tmp_path: Path, naming: Any, prefix: str) -> None:
    base = build_tiny_anima(tmp_path, SEED, prefix)
    everything = {"train_llm_adapter": "True", "include_patterns": ".*"}
    expected = prediction(base, tmp_path / "lora.safetensors", **everything)
    assert (prediction(base) - expected).abs().max() > 0.01
    file = read_adapter_file(tmp_path / "lora.safetensors")
    save_adapter_file(tmp_path / "renamed.safetensors", rename(file, NAMES, naming).file)
    merged = merge(base[1], tmp_path / "renamed.safetensors", tmp_path / "merged.safetensors")
    actual = prediction(["--pretrained_model_name_or_path", merged, *base[2:]])
    torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)
    assert read_metadata(Path(merged))["modelspec.architecture"] == "anima-preview"
    before, after = load_file(base[1]), load_file(merged)
    assert before.keys() == after.keys()
    changed = {key.removeprefix(prefix) for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{name.generic.removeprefix('diffusion_model.')}.weight" for name in names_in(file.modules)}


def names_in(modules: Any) -> list[Any]:
    return [name for module in modules if (name := NAMES.find(module)) is not None]


def test_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build_tiny_anima(tmp_path / "files", SEED)
    prediction(base, tmp_path / "lora.safetensors")
    (tmp_path / "files" / "model_index.json").write_text('{"_class_name": "AnimaModularPipeline"}')
    arguments = ["--models", str(tmp_path / "lora.safetensors"), "--save_to", str(tmp_path / "out.safetensors")]
    assert merge_lora.main(["--sd_model", str(tmp_path / "files"), *arguments]) == 1
    assert "for Anima use the transformer's file" in capsys.readouterr().err
