"""The commands of musubi-tuner's pages, typed in this repository's folder."""

import subprocess
import sys
from collections.abc import Sequence
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
    """Run `python src/musubi_tuner/…`, or a training by `accelerate launch`, and return its log."""
    launcher = ["-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16"]
    return run_script(f"src/musubi_tuner/{script}.py", words.format(**paths), launcher if "_train_" in script else [])


def run_script(script: str, words: str, launcher: Sequence[str] = ()) -> str:
    """Run a script from this repository's folder and return its log."""
    command = [sys.executable, *launcher, script, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stderr
