"""tools/merge_lora.py on Krea 2: the merged checkpoint computes what the adapter did, whatever its file's names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.krea2.adapter_names import NAMES
from library.checkpoints.files import read_metadata
from networks import lora_krea2
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.parity.test_krea2_model import inputs
from tests.tiny.krea2 import build_tiny_krea2
from tests.tolerances import FLOAT32_DEEP
from tests.unit.architectures.krea2.test_load import opened
from tools import convert_lora, merge_lora


@pytest.mark.parametrize("naming", ["kohya", "generic", "diffusers"])
@pytest.mark.parametrize("layout", ["files", "whole"])
def test_the_merged_checkpoint_computes_what_the_adapter_did(tmp_path: Path, naming: Any, layout: Any) -> None:
    arguments = build_tiny_krea2(tmp_path, 33, layout)
    denoiser = opened(arguments).denoiser()
    values = [value.detach() for value in inputs(4, 6)]
    lora = tmp_path / "lora.safetensors"
    base, expected = save_trained(lora_krea2, lora, {}, denoiser, lambda: denoiser(*values))
    assert (expected - base).abs().max() > 0.01
    save_adapter_file(tmp_path / "renamed.safetensors", rename(read_adapter_file(lora), NAMES, naming).file)
    merged = tmp_path / "merged.safetensors"
    words = ["--sd_model", arguments[1], "--models", str(tmp_path / "renamed.safetensors"), "--save_to", str(merged)]
    assert merge_lora.main(words) == 0
    found = opened([arguments[0], str(merged), *arguments[2:]]).denoiser()
    torch.testing.assert_close(found(*values), expected, **FLOAT32_DEEP)
    assert read_metadata(merged)["modelspec.architecture"] == "Krea-2"


def test_the_command_converts_into_every_naming(tmp_path: Path) -> None:
    denoiser = opened(build_tiny_krea2(tmp_path, 33)).denoiser()
    values = [value.detach() for value in inputs(4, 6)]
    lora = tmp_path / "lora.safetensors"
    save_trained(lora_krea2, lora, {}, denoiser, lambda: denoiser(*values))
    for naming, key in (
        ("kohya", "lora_unet_blocks_0_attn_wq.lora_down.weight"),
        ("generic", "diffusion_model.blocks.0.attn.wq.lora_A.weight"),
        ("diffusers", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
    ):
        path = tmp_path / f"{naming}.safetensors"
        assert convert_lora.main(["--model", str(lora), "--save_to", str(path), "--to", naming]) == 0
        assert key in {name for module in read_adapter_file(path).modules.values() for name in module.keys.values()}
