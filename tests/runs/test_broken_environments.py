"""Broken environments: a library that fails to import, a hub that never answers, closed output."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from library.environment.hidden_libraries import BITSANDBYTES
from tests.running import ROOT

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
