"""Third-party network modules that train the base model's norms on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from library.checkpoints.files import load_state_dict
from tests.running import ROOT, make_images
from tests.tiny.sdxl import build_tiny_sdxl

pytest.importorskip("lycoris")


@pytest.mark.parametrize("algo", ["locon", pytest.param("lokr", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.nightly)])
def test_training_group_norms_on_the_cpu_does_not_crash(tmp_path: Path, algo: str, precision: str) -> None:
    """Use a subprocess, since torch's backward pass of channels-last group norms caused a segmentation fault."""
    make_images(tmp_path / "data" / "1_thing", 2, seed=64)
    command = [
        sys.executable, str(ROOT / "sdxl_train_network.py"), "--pretrained_model_name_or_path",
        str(build_tiny_sdxl(tmp_path / "model", 53)), "--train_data_dir", str(tmp_path / "data"), "--resolution", "64",
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module", "lycoris.kohya",
        "--network_args", f"algo={algo}", "train_norm=True", "preset=full", "factor=4", "--network_dim", "2",
        "--network_train_unet_only", "--mixed_precision", precision, "--max_train_steps", "2", "--seed", "5",
        "--learning_rate", "1e-2", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    norms = [t for key, t in load_state_dict(tmp_path / "out" / "mine.safetensors").items() if key.endswith("w_norm")]
    assert norms and all(float(norm.abs().max()) > 0 for norm in norms)
