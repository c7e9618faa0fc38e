"""train.py --like: a LoRA or a configuration of another trainer decides how photos are trained."""

import json
from pathlib import Path

import pytest
import toml
import torch
from safetensors.torch import load_file

import train
from tests.contracts.other_trainers import find_example
from tests.running import fresh_process, make_images  # noqa: F401
from tools.quickstart.toy_world import QUICKSTART

TOY_BASE = QUICKSTART / "toy_base"
RANK, ALPHA = 4, 8


def save_lora_of_diffusers(folder: Path) -> Path:
    """Save a LoRA of the toy base with diffusers and PEFT, in their names and with their metadata."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(TOY_BASE / "unet")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    torch.manual_seed(0)
    unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict(), safe_serialization=True
    )
    path = folder / "pytorch_lora_weights.safetensors"
    assert LORA_ADAPTER_METADATA_KEY in json.dumps(train_metadata(path))
    return path


def train_metadata(path: Path) -> dict[str, str]:
    from library.checkpoints.headers import read_metadata

    return dict(read_metadata(path))


@pytest.mark.slow
def test_a_lora_of_diffusers_goes_on_with_the_photos_of_the_quickstart(
    tmp_path: Path,
    fresh_process: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs, out = save_lora_of_diffusers(tmp_path), tmp_path / "out"
    status = train.main([
        str(QUICKSTART / "dataset"), "--base", str(TOY_BASE), "--trigger", "heart", "--like", str(theirs), "--steps",
        "2", "--output_dir", str(out), "--name", "mine", "--yes",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"like {theirs.name}" in printed and "network_dim 4" in printed and "it goes on from its weights" in printed
    mine, before = load_file(out / "mine.safetensors"), load_file(theirs)
    downs = [key for key in mine if key.endswith("attn1_to_q.lora_down.weight")]
    assert len(downs) > 2 and {mine[key].shape[0] for key in downs} == {RANK}
    assert {float(mine[key.replace("lora_down.weight", "alpha")]) for key in downs} == {float(ALPHA)}
    starts = [value for key, value in before.items() if "lora_A" in key or "lora.down" in key]
    nearest = [min(float(torch.dist(m, s) / s.norm()) for m in mine.values() if m.shape == s.shape) for s in starts]
    assert len(starts) > 8 and max(nearest) < 0.2  # two steps move the weights of their start only a little


def test_a_configuration_decides_all_but_length_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "photos", 4)
    file = find_example("Nerogar/OneTrainer", "sd 1.5 LoRA").write(tmp_path)
    out = tmp_path / "out"
    words = [str(images), "--base", str(TOY_BASE), "--trigger", "heart", "--output_dir", str(out), "--name", "mine"]
    assert train.main([*words, "--like", str(file), "--plan_only"]) == 0
    values = toml.loads((out / "mine.toml").read_text(encoding="utf-8"))
    taken = {"network_dim": 16, "network_alpha": 1.0, "learning_rate": 3e-4, "lr_scheduler": "constant_with_warmup",
             "optimizer_type": "AdamW", "train_batch_size": 4}  # fmt: skip
    assert {name: values[name] for name in taken} == taken
    assert "unet_lr" not in values and "optimizer_args" not in values  # the recipe's, for another optimizer
    assert "like config.json" in capsys.readouterr().out and values["max_train_steps"] > 0


def test_a_file_for_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "photos", 4)
    words = [str(images), "--base", str(TOY_BASE), "--trigger", "heart", "--yes", "--output_dir", str(tmp_path / "out")]
    file = find_example("ostris/ai-toolkit", "lora_flux_24gb").write(tmp_path)
    assert train.main([*words, "--like", str(file)]) == 1
    assert "is for flux_train_network.py" in capsys.readouterr().err
    (tmp_path / "poem.txt").write_text("roses are red")
    assert train.main([*words, "--like", str(tmp_path / "poem.txt")]) == 1
    assert "is neither a LoRA nor a configuration" in capsys.readouterr().err
