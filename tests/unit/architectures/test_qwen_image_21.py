"""Qwen-Image 2.1 models load alike in every layout; other files are refused with what they are."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.qwen_image_21.assembly import build
from library.architectures.qwen_image_21.load import open_loader
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.base.errors import UserError
from library.models.dit_loader import DitLoader
from library.types import CaptionWithImages
from qwen_image_21_train_network import setup_parser
from tests.running import tiny_model
from tests.tiny.changes import with_changes
from tests.tiny.qwen_image_21 import with_fused_gates

BASE = "--pretrained_model_name_or_path"


tiny = tiny_model("qwen_image_21", 3)


def options_of(arguments: list[str]) -> QwenImage21Options:
    return QwenImage21Options.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))


@pytest.mark.parametrize("per_row", [False, True], ids=["one scale", "a scale per row"])
def test_fp8_files_with_fused_gates_keep_their_codes_and_scales(tiny: list[str], tmp_path: Path, per_row: bool) -> None:
    state = with_fused_gates(load_file(tiny[1]))
    name = "transformer_blocks.0.img_mlp.gate_up"
    weight = state[f"{name}.weight"]
    scale = (weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    more = {f"{name}.weight": codes, f"{name}.scale_weight": scale, "scaled_fp8": torch.zeros(2)}
    save_file({**state, **more}, tmp_path / "fp8.safetensors")
    loader = open_tiny([BASE, str(tmp_path / "fp8.safetensors"), *tiny[2:]])
    mlp: Any = loader.denoiser().get_submodule("transformer_blocks.0.img_mlp")
    gate, value = (codes.float() * scale).chunk(2)
    torch.testing.assert_close(mlp.gate_layer.weight, gate, rtol=1e-6, atol=0)
    torch.testing.assert_close(mlp.proj.weight, value, rtol=1e-6, atol=0)
    parts = loader.denoiser_weights.quantised[f"{name.replace('gate_up', 'proj')}.weight"].read()
    assert parts is not None and torch.equal(parts["codes"].float(), codes.float().chunk(2)[1])
    assert parts["scales"].shape == ((192, 1) if per_row else ())


def test_a_text_encoder_without_its_vision_model_encodes_captions_but_not_references(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {name: None for name in load_file(tiny[5]) if ".visual." in name}
    arguments = with_changes(tiny, "--text_encoder", tmp_path, changes)
    shutil.copytree(Path(tiny[1]).parent / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    arch = build(options_of(arguments))
    encoders = arch.load.text_encoders()
    assert "has no vision model" in caplog.text and len(encoders) == 1
    arch.text.encode(encoders, arch.text.tokenize(["a cat"]))
    with_images = CaptionWithImages("a cat", "digest", lambda: (torch.zeros(3, 32, 32),))
    with pytest.raises(UserError, match="--text_encoder has no vision model, which reference images require; use"):
        arch.text.encode(encoders, arch.text.tokenize([with_images]))
