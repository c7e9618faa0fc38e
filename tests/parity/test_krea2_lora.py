"""Namings of Krea 2 adapters that diffusers does not read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.krea2.layers import NAMES
from networks import lora_krea2
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.renaming import rename
from tests.parity.test_dit_lora import DITS

KREA2 = DITS["krea2"]


def test_diffusers_reads_no_other_naming(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files are therefore not saved with alphas and dotted names, or with Kohya names."""
    from diffusers import Krea2Pipeline

    path = tmp_path / "ours.safetensors"
    KREA2.trained_file(lora_krea2, path, {})
    with pytest.raises(ValueError, match="should be empty"):
        Krea2Pipeline.lora_state_dict({**load_file(path), "diffusion_model.blocks.0.attn.wq.alpha": torch.tensor(1.0)})
    kohya = rename(read_adapter_file(path), NAMES, "kohya").file
    save_file(adapter_tensors(kohya), tmp_path / "kohya.safetensors")
    with pytest.raises((ValueError, AssertionError)):
        KREA2.diffusers_prediction(tmp_path / "kohya.safetensors", caplog)
