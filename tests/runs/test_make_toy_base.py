"""The command that makes the quickstart's base model, with a handful of steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT
from tools.quickstart.sampling import Prompt, load_pipeline, sample

pytestmark = pytest.mark.nightly


def test_a_few_steps_make_a_folder_that_diffusers_samples_from(tmp_path: Path) -> None:
    out = tmp_path / "base"
    command = [sys.executable, str(ROOT / "tools" / "quickstart" / "make_toy_base.py"), "--out", str(out)]
    command += ["--images_per_scene", "1"]
    for stage in ("vae", "unet"):
        command += [f"--{stage}_steps", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    weights = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert 8e6 < weights <= 12e6
    (image,) = sample(load_pipeline(out), [Prompt("a small red circle on a white background", 1)])
    assert image.shape == (64, 64, 3)
