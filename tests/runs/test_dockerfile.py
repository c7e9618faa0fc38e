"""The Dockerfile's instructions, executed in order in a separate environment without Docker."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.environment.lock_file import read_entries
from tests.running import make_images
from tests.tiny.bases import BASES

ROOT = Path(__file__).parents[2]
ONLY_FOR_DOCKER = ("FROM", "ARG", "WORKDIR", "ENV", "VOLUME", "USER")
FOLDERS = "install -d -m 1777 /output /hub"


def instructions() -> Iterator[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        yield name, rest


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True)
    return [Path(name) for name in listing.stdout.splitlines()]


def test_copied_files_exist_and_the_sources_are_copied_last() -> None:
    """Otherwise every change of the sources would download torch again."""
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY"]
    assert copied[-1] == ["."] and all((ROOT / name).is_file() for names in copied[:-1] for name in names)
    names = [name for name, _ in instructions()]
    assert names.index("FROM") == 0 and names[-2:] == ["COPY", "CMD"]


def test_it_runs_as_no_root_and_keeps_files_outside_the_container() -> None:
    found = dict(instructions())
    assert found["USER"] == "1000" and set(found["VOLUME"].split()) == {"/pictures", "/models", "/output", "/hub"}
    assert "HF_HOME=/hub" in found["ENV"] and ("RUN", FOLDERS) in instructions()


def test_the_packages_beside_torch_are_installed_as_locked_with_their_hashes(tmp_path: Path) -> None:
    (command,) = (rest for name, rest in instructions() if name == "RUN" and "lock" in rest)
    listing, _, installation = command.partition(" && ")
    python, place = f'"{sys.executable}"', tmp_path / "packages"
    subprocess.run(
        ["bash", "-ec", listing.replace("python", python, 1).replace("/tmp/beside-torch.lock", f'"{place}"')],
        cwd=ROOT,
        check=True,
    )
    entries = read_entries(place.read_text())
    assert {"transformers", "diffusers"} <= {entry.name for entry in entries} and all(entry.hashes for entry in entries)
    assert "torch" not in {entry.name for entry in entries}
    assert installation == "pip install --no-cache-dir --require-hashes --no-deps -r /tmp/beside-torch.lock"


@pytest.mark.nightly
@pytest.mark.skipif(getattr(os, "getuid", lambda: 1)() != 0, reason="its commands install packages of the system")
def test_its_commands_build_an_environment_that_trains(tmp_path: Path) -> None:
    app, venv = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", "ACCELERATE_USE_CPU": "true"}

    def run(*command: str) -> None:
        subprocess.run(command, cwd=app, env=environment, check=True)

    for name, rest in instructions():
        if name == "RUN":
            run("bash", "-ec", rest.replace("rm -rf /var/lib/apt/lists/*", "true").replace(FOLDERS, "true"))
        elif name == "COPY":
            wanted = rest.split()[:-1]
            for file in tracked_files() if wanted == ["."] else map(Path, wanted):
                (app / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, app / file)
        elif name == "CMD":
            run(*json.loads(rest))
        else:
            assert name in ONLY_FOR_DOCKER, f"{name} is not carried out here"
    make_images(tmp_path / "data" / "1_thing", 2)
    run(
        "python", "train_network.py", *BASES["sd"].build(tmp_path / "model"), "--train_data_dir",
        str(tmp_path / "data"), "--resolution", "64", "--network_module", "networks.lora", "--max_train_steps", "1",
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine",
    )  # fmt: skip
    assert (tmp_path / "out" / "mine.safetensors").is_file()
