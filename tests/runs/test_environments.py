"""Broken and unusual environments: libraries that fail to import, old packages, other devices, containers."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.environment.hidden_libraries import BITSANDBYTES
from library.environment.lock_file import read_entries
from library.models import rotary
from library.processes.process_group import Processes
from library.training.command_line import training
from tests.device_standin import device_without_float64
from tests.running import ROOT, Finished, make_images
from tests.tiny.bases import BASES

ERRORS = [
    "RuntimeError('CUDA setup failed')",
    pytest.param("OSError('libcudart.so')", marks=pytest.mark.nightly),
    pytest.param("ImportError('x')", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("error", ERRORS)
def test_an_optional_library_that_fails_to_import_does_not_end_a_run(
    base_arguments: list[str], tmp_path: Path, error: str
) -> None:
    (tmp_path / "broken" / BITSANDBYTES).mkdir(parents=True)
    (tmp_path / "broken" / BITSANDBYTES / "__init__.py").write_text(f"raise {error}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}
    command = [sys.executable, str(ROOT / "train_network.py"), *base_arguments, "--max_train_steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine.safetensors").is_file()


@pytest.mark.parametrize("package", ["xformers", "torchvision"])
def test_a_library_that_diffusers_or_transformers_imports_by_itself_is_named(
    base_arguments: list[str], tmp_path: Path, package: str
) -> None:
    metadata = tmp_path / "broken" / f"{package}-9.9.dist-info"
    for folder in (metadata, tmp_path / "broken" / package):
        folder.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
    (metadata / "top_level.txt").write_text(package)
    (tmp_path / "broken" / package / "__init__.py").write_text("raise OSError('undefined symbol: _ZN5torch')")
    command = [sys.executable, str(ROOT / "train_network.py"), *base_arguments, "--max_train_steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "this is a bug" not in done.stderr
    named = f"{package} 9.9 cannot be imported (OSError: undefined symbol: _ZN5torch)"
    assert f"{named}; install another version: pip install --upgrade {package}" in done.stderr


def test_a_run_with_nf4_weights_imports_bitsandbytes(base_arguments: list[str], tmp_path: Path) -> None:
    """Use a fresh process, in which nothing has imported it before."""
    arguments = [*base_arguments, "--max_train_steps", "1", "--base_format", "nf4", "--mixed_precision", "bf16"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_network.py"), *arguments], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "layers in nf4" in done.stderr
    assert (tmp_path / "out" / "mine.safetensors").is_file()


def test_a_hub_that_never_answers_times_out_in_seconds(tmp_path: Path) -> None:
    """Use a fresh process, since the hub client reads its address at import."""
    code = (
        "from library.checkpoints.model_lookup import find_model\n"
        "try: find_model('--vae', 'someone/never', (('',),))\n"
        "except ValueError as error: print(error)"
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "--vae someone/never is neither a file nor a folder, and cannot" in ran.stdout, ran.stderr
    assert time.monotonic() - started < 45


def pipe_without_reader() -> int:
    """Return a pipe whose reader has exited, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(
    ("open_output", "more"),
    [
        pytest.param(pipe_without_reader, [], id="pipe"),
        pytest.param(pipe_without_reader, ["--console_log_simple"], id="pipe_simple", marks=pytest.mark.nightly),
        pytest.param(lambda: os.open("/dev/full", os.O_WRONLY), [], id="full_disk"),
        pytest.param(None, [], id="closed", marks=pytest.mark.nightly),
    ],
)
def test_output_that_cannot_be_written_does_not_end_a_run(
    base_arguments: list[str], tmp_path: Path, open_output: Callable[[], int] | None, more: list[str]
) -> None:
    words = [str(ROOT / "train_network.py"), *base_arguments, "--max_train_steps", "1", *more]
    if open_output is None:
        done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, *words])
    else:
        output = open_output()
        done = subprocess.run([sys.executable, *words], stdout=output, stderr=output)
        os.close(output)
    assert done.returncode == 0
    assert (tmp_path / "out" / "mine.safetensors").is_file()


# Every architecture trains, validates and draws on a device without float64, with the results of the CPU.

Train = Callable[..., Finished]


# U-Nets compute no rotary angles and the other models share one function, so these two cover the rest
SLOW = tuple(name for name in BASES if name not in ("flux", "flux_2"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.nightly] if n in SLOW else []) for n in BASES])
def test_a_run_needs_no_float64_on_its_device(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = BASES[name]
    make_images(tmp_path / "data" / "1_thing", 3, seed=62)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    words = [
        *base.build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt",
        "--resolution", "64", "--output_name", "mine", "--network_module", base.module, "--network_dim", "4",
        "--learning_rate", "1e-3", "--seed", "5", "--max_data_loader_n_workers", "0", "--max_train_steps", "1",
        "--validation_split", "0.4", "--validate_every_n_steps", "1", "--sample_every_n_steps", "1",
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--scale_weight_norms", "1", "--save_state",
    ]  # fmt: skip
    # The simulated device has no complex numbers, and sums round differently.
    monkeypatch.setattr(rotary, "HAVE_COMPLEX", ())
    train([*words, "--output_dir", str(tmp_path / "plain")], script=base.script).ok()
    with device_without_float64() as device:
        monkeypatch.setattr(training, "from_accelerator", lambda accelerator: Processes(device=device))
        done = train([*words, "--output_dir", str(tmp_path / "there")], script=base.script)
    assert done.status == 0, done.stderr
    first, second = (load_state_dict(tmp_path / folder / "mine.safetensors") for folder in ("plain", "there"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list((tmp_path / "there" / "sample").glob("*.png"))) == 1


# Base models train in kohya_ss' environment with its pinned packages.

PINS = Path(__file__).with_name("kohya_ss.txt")


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


@pytest.mark.nightly
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


# The Dockerfile's instructions, executed in order in a separate environment without Docker.

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
