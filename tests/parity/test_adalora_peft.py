"""AdaLoRA folders saved by PEFT: merged as in PEFT, also with pruned modules, and trained further as LoRA."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.checkpoints.files import load_state_dict
from networks.core.files.adapter_file import read_adapter_file
from tests.tiny.sd import build_tiny_sd
from tests.tolerances import FLOAT32_SAME_MATH
from tools import check_lora_weights, merge_lora

peft = pytest.importorskip("peft")

RANK, ALPHA = 4, 7
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2"]


def unet_of(folder: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    return unet.requires_grad_(False)


def save_by_peft(base: Path, folder: Path, kept: dict[str, list[bool]]) -> dict[str, Tensor]:
    """Save a folder with PEFT and return the weights of `LAYERS` that it merges; `kept` masks the unpruned ranks."""
    torch.manual_seed(631)
    settings = peft.AdaLoraConfig(
        init_r=RANK, target_r=2, lora_alpha=ALPHA, total_step=10, tinit=1, tfinal=1, target_modules=LAYERS
    )
    theirs = peft.get_peft_model(unet_of(base), settings)
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    if kept:
        ranks = {f"{layer}.lora_E.default": kept.get(layer, [True] * RANK) for layer in LAYERS}
        theirs.peft_config["default"].rank_pattern = ranks
    theirs.save_pretrained(str(folder))
    merged = peft.PeftModel.from_pretrained(unet_of(base), str(folder)).merge_and_unload()
    return {layer: merged.get_parameter(f"{layer}.weight").detach() for layer in LAYERS}


@pytest.mark.parametrize(
    "kept", [{}, {LAYERS[0]: [True, False, False, True], LAYERS[1]: [False] * RANK}], ids=["all ranks", "pruned"]
)
def test_merging_into_a_checkpoint_matches_peft(kept: dict[str, list[bool]], tmp_path: Path) -> None:
    base = build_tiny_sd(tmp_path / "sd", 632)
    wanted = save_by_peft(base, tmp_path / "peft", kept)
    assert any(key.endswith("lora_E") for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    words = ["--sd_model", str(base), "--models", str(tmp_path / "peft"), "--save_to", str(tmp_path / "out")]
    assert merge_lora.main(words) == 0
    before = load_state_dict(base / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_state_dict(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {key.removesuffix(".weight") for key in after if not torch.equal(after[key], before[key])}
    assert changed == {layer for layer in LAYERS if any(kept.get(layer, [True]))}
    for layer, weight in wanted.items():
        torch.testing.assert_close(after[f"{layer}.weight"], weight, **FLOAT32_SAME_MATH)


def test_the_tools_read_it_and_it_trains_further_as_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build_tiny_sd(tmp_path / "sd", 633)
    save_by_peft(base, tmp_path / "peft", {})
    assert check_lora_weights.main([str(tmp_path / "peft"), "--json"]) == 0
    assert '"rank": 4' in capsys.readouterr().out
    words = ["--models", str(tmp_path / "peft"), "--concat", "--save_to", str(tmp_path / "lora.safetensors")]
    assert merge_lora.main(words) == 0
    file, joined = read_adapter_file(tmp_path / "peft"), read_adapter_file(tmp_path / "lora.safetensors")
    for layer in LAYERS:
        joined_weight = joined.modules[f"lora_unet_{layer.replace('.', '_')}"].weight()
        torch.testing.assert_close(
            joined_weight, file.modules[f"base_model.model.{layer}"].weight(), **FLOAT32_SAME_MATH
        )


@pytest.mark.parametrize(
    ("leaf", "shape", "message"),
    [
        ("lora_A", None, "without its lora_A"),
        ("lora_E", (RANK - 1, 1), "do not fit together"),
        ("lora_B", None, "lora_B"),
    ],
)
def test_mismatched_tensors_are_named(leaf: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    save_by_peft(build_tiny_sd(tmp_path / "sd", 634), tmp_path / "peft", {})
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{LAYERS[2]}.{leaf}"
    old = tensors.pop(key)
    save_file({**tensors, **({} if shape is None else {key: old[: shape[0]].clone()})}, path)
    with pytest.raises(ValueError, match=message):
        read_adapter_file(tmp_path / "peft")
