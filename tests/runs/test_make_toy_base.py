"""The commands that create the toy base models of the quickstart and of edits, with a few steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.toys import make_toy_edit_base
from tests.running import ROOT
from tools.quickstart.sampling import Prompt, load_pipeline, sample

pytestmark = pytest.mark.nightly


def test_a_few_steps_write_a_folder_that_diffusers_can_sample_from(tmp_path: Path) -> None:
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


def test_all_of_the_toy_edit_model_but_the_transformer_depends_only_on_the_seed(tmp_path: Path) -> None:
    out, shipped = tmp_path / "base", ROOT / "configs" / "quickstart" / "toy_edit_base"
    assert make_toy_edit_base.main(["--out", str(out), "--num_edits", "60", "--steps", "2"]) == 0
    written = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    assert len(written) == 15 and all((shipped / name).is_file() for name in written)
    differing = [name for name, path in written.items() if path.read_bytes() != (shipped / name).read_bytes()]
    assert differing == [Path("transformer", "diffusion_pytorch_model.safetensors")]
