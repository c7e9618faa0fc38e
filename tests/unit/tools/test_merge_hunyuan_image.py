"""tools/merge_lora.py on HunyuanImage 2.1: the merged checkpoint predicts what the adapted model did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.hunyuan_image.adapter_names import NAMES
from library.architectures.hunyuan_image.checkpoint_keys import from_original
from library.architectures.hunyuan_image.model import HunyuanImage
from library.checkpoints.files import read_metadata
from library.models.adapter_views import view_denoiser
from networks import lora_hunyuan_image
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.tiny.hunyuan_image import build_tiny_hunyuan_image, inputs, tiny_hunyuan_image
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize
from tools import merge_lora

pytestmark = pytest.mark.slow

SEED = 31


def adapter(path: Path, **arguments: str) -> torch.Tensor:
    """Save an adapter with random weights and return the model's prediction with it."""
    model = tiny_hunyuan_image(SEED)
    _, view = view_denoiser([], model)
    network = lora_hunyuan_image.create_network(1.0, 4, 2, None, [], view, **arguments)
    randomize(network, 3)
    network.apply_to([], view, False, True)
    network.eval()
    network.save_weights(str(path), None, {})
    return prediction(model)


def prediction(model: HunyuanImage) -> torch.Tensor:
    output: torch.Tensor = model(*(value.detach() for value in inputs(3, 5).values()))
    return output


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("naming", ["kohya", "generic", "diffusers", "sd-scripts"])
def test_the_merged_transformer_matches_the_adapted_model(tmp_path: Path, naming: str, prefix: str) -> None:
    base = Path(build_tiny_hunyuan_image(tmp_path, SEED)[1])
    if prefix:
        save_file({prefix + key: tensor for key, tensor in load_file(base).items()}, base)
    lora, save_to = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    expected = adapter(lora, split_qkv="True")
    if naming == "sd-scripts":
        theirs = {entry.kohya: entry.aliases[0] for entry in NAMES.modules if entry.aliases}
        split = {key: key.partition(".") for key in load_file(lora)}
        renamed = {f"{theirs.get(name, name)}.{leaf}": load_file(lora)[key] for key, (name, _, leaf) in split.items()}
        save_file(renamed, lora)
    else:
        save_adapter_file(lora, rename(read_adapter_file(lora), NAMES, naming).file)  # type: ignore[arg-type]
    assert merge_lora.main(["--sd_model", str(base), "--models", str(lora), "--save_to", str(save_to)]) == 0
    model = tiny_hunyuan_image(SEED)
    model.load_state_dict(
        {
            from_original(key.removeprefix(prefix)): tensor.flatten(1) if tensor.ndim == 4 else tensor
            for key, tensor in load_file(save_to).items()
        }
    )
    torch.testing.assert_close(prediction(model), expected, **FLOAT32_DEEP)
    assert read_metadata(save_to)["modelspec.architecture"] == "hunyuan-image-2.1"


def test_unusable_base_models_are_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "lora.safetensors")
    build_tiny_hunyuan_image(tmp_path / "folder", SEED, "diffusers")
    arguments = ["--models", str(tmp_path / "lora.safetensors"), "--save_to", str(tmp_path / "out")]
    assert merge_lora.main(["--sd_model", str(tmp_path / "folder"), *arguments]) == 1
    assert "merging supports only a file in the original layout" in capsys.readouterr().err
