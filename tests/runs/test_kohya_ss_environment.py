"""Base models train in kohya_ss' environment with its pinned packages."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from tests.running import Finished, make_images
from tests.tiny.bases import BASES

PINS = Path(__file__).with_name("kohya_ss.txt")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="session")
def python_of_kohya_ss() -> Path:
    """Return the Python of an environment with the pinned packages, created once (4 GB of downloads)."""
    digest = hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = Path.home() / ".cache" / "lora-tests" / f"kohya_ss-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [folder / "bin/python", "-m", "pip", "install", "-q", "-r", PINS]
            subprocess.run(install, check=True)
            (folder / "complete").touch()
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def installed_scripts(tmp_path_factory: pytest.TempPathFactory, python_of_kohya_ss: Path) -> Path:
    """Return the folder of the scripts in a front end like kohya_ss, after a start of kohya_ss.

    It is a git repository with sd-scripts as a submodule, which kohya_ss updates when it starts.
    """
    folder = tmp_path_factory.mktemp("front_end")

    def git(place: str, *words: str) -> None:
        settings = ["-c", "protocol.file.allow=always", "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", folder / place, *settings, *words], check=True, capture_output=True)

    for name in ("sd-scripts", "kohya_ss"):
        (folder / name).mkdir()
        (folder / name / "train_network.py").write_text("raise SystemExit('the old one')\n")
        git(name, "init")
        git(name, "add", "--all")
        git(name, "commit", "--message", "scripts")
    git("kohya_ss", "submodule", "add", str(folder / "sd-scripts"), "sd-scripts")
    git("kohya_ss", "commit", "--message", "sd-scripts")
    # The front end's Python has no packages that this command could need before they are installed.
    subprocess.run([python_of_kohya_ss, "-I", "-S", ROOT / "tools/front_end.py", folder / "kohya_ss"], check=True)
    git("kohya_ss", "submodule", "update", "--init", "--recursive")
    return folder / "kohya_ss" / "sd-scripts"


@pytest.mark.parametrize("name", sorted(name for name, base in BASES.items() if not base.needs_newer))
def test_a_base_model_trains_the_same_in_both_environments(
    tmp_path: Path, train: Callable[..., Finished], python_of_kohya_ss: Path, installed_scripts: Path, name: str
) -> None:
    base = BASES[name]
    make_images(tmp_path / "data" / "1_thing", 2)

    def words(output_name: str) -> list[str]:
        return [
            *model, "--train_data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path), "--resolution", "64",
            "--output_name", output_name, "--network_module", "networks.lora", "--network_dim", "2", "--seed", "1",
            "--max_train_steps", "4", "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0",
            "--gradient_checkpointing",
        ]  # fmt: skip

    model = base.build(tmp_path / "model")
    command = [python_of_kohya_ss, installed_scripts / f"{base.script}.py", *words("there")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed_scripts.parent)
    assert done.returncode == 0, done.stderr
    assert train(words("here"), base.script).status == 0
    there, here = (load_file(tmp_path / f"{output_name}.safetensors") for output_name in ("there", "here"))
    assert there.keys() == here.keys()
    # Compare all weights together: AdamW moves single ones by the sign of negligible gradients.
    difference, size = (norm([f(key) for key in here]) for f in (lambda key: there[key] - here[key], here.__getitem__))
    assert difference < 0.01 * size


def norm(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors])))
