"""A weight format is one file in library/memory/formats: a made-up one is added to a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from tests.made_up.int6 import FORMAT
from tests.running import ROOT, make_images

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made_up") / "project"
    for name in ("library", "networks", "benchmarks"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "train_network.py", root)
    shutil.copy(HERE / "int6.py", root / "library" / "memory" / "formats")  # nothing else is added
    return root


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("shape", [(70, 96), (5, 7), (6, 3, 3, 3)], ids=str)
def test_its_error_is_half_a_step_and_its_bytes_match_the_plan(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(981))
    parts = FORMAT.codec.encode(weight)
    step = weight.flatten(1).abs().amax(1) / 31
    off = (FORMAT.codec.decode(parts, weight.shape, torch.float32) - weight).flatten(1).abs().amax(1)
    assert (off <= step / 2 + 1e-6).all() and (off > step / 8).all()
    num_bytes = sum(part.numel() * part.element_size() for part in parts.values())
    assert num_bytes == FORMAT.num_bytes(shape[0], weight[0].numel(), 4)


def test_base_format_accepts_it_and_the_planner_uses_it(project: Path, tiny_sd_folder: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "data" / "1_thing", 2, seed=982)
    done = run(
        project, "train_network.py", "--pretrained_model_name_or_path", str(tiny_sd_folder), "--train_data_dir",
        str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64", "--output_dir",
        str(tmp_path / "out"), "--output_name", "mine", "--network_module", "networks.lora", "--network_dim", "4",
        "--learning_rate", "1e-3", "--seed", "7", "--max_train_steps", "1", "--max_data_loader_n_workers", "0",
        "--base_format", "int6", "--fit", "12GB",
    )  # fmt: skip
    assert re.search(r"-> +--base_format int6 ", done.stderr)
    assert re.search(r"denoiser: \d+ layers in int6", done.stderr)
    tensors = load_state_dict(tmp_path / "out" / "mine.safetensors")
    assert any(float(tensor.abs().max()) > 0 for key, tensor in tensors.items() if "lora_up" in key)


@pytest.mark.nightly
def test_help_and_documentation_list_it(project: Path) -> None:
    help_text = " ".join(run(project, "train_network.py", "--help").stdout.split())
    assert "--base_format {bf16,fp8,int6,int8,int8_rotated,nf4,nf4_double}" in help_text
    table = run(project, "-m", "benchmarks", "format_errors", "--side", "256").stdout
    assert re.search(r"(?m)^\| `int6` \| 0\.766 \| [1-9]\.\d\d % \|", table)
