"""The documented commands of musubi-tuner, without its script folder and accelerate's launcher."""

import subprocess
import sys
from pathlib import Path

from tests.running import ROOT, make_images


def paths_of(model: list[str], tmp_path: Path) -> dict[str, str]:
    """Write three images and a dataset file; return replacements for the paths in a command."""
    make_images(tmp_path / "images", 3)
    (tmp_path / "data.toml").write_text(
        '[general]\nresolution = [96, 64]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n'
        "bucket_no_upscale = false\n\n[[datasets]]\n"
        f'image_directory = "{tmp_path / "images"}"\ncache_directory = "{tmp_path / "cache"}"\nnum_repeats = 1\n'
    )
    dit, vae, text = model[1], model[3], model[5]
    return {"dit": dit, "vae": vae, "text": text, "data": str(tmp_path / "data.toml"), "out": str(tmp_path / "out")}


def run_command(script: str, words: str, paths: dict[str, str]) -> str:
    """Run a command and return its log."""
    line = [sys.executable, str(ROOT / "src" / "musubi_tuner" / f"{script}.py"), *words.format(**paths).split()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr
