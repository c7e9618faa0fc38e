"""Memory-saving options in the scripts give the images and adapters of a run without them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.running import ROOT, Finished, make_images
from tests.tiny.bases import BASES

Train = Callable[..., Finished]

NIGHTLY = [
    pytest.param(name, marks=pytest.mark.nightly) for name in BASES if name not in ("flux", "sd2")
]  # sd2: like sd
OFFLOADED = ("--gradient_checkpointing", "--cpu_offload_checkpointing", "--gradient_checkpointing_every", "2")


@pytest.fixture(scope="module", params=["flux", *NIGHTLY])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return BASES[name].build_deep(tmp_path_factory.mktemp(name))


@pytest.fixture
def run(train: Train, name: str, model: list[str], tmp_path: Path) -> Callable[..., Finished]:
    """Return `run(folder, ...)`, which trains three steps with validation and previews into a folder of `tmp_path`."""
    make_images(tmp_path / "data" / "1_thing", 5, seed=71)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    arguments = [
        *model, "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64",
        "--output_name", "mine", "--network_module", BASES[name].module, "--network_dim", "4", "--network_alpha", "2",
        "--learning_rate", "1e-3", "--seed", "5", "--max_data_loader_n_workers", "0", "--sample_prompts",
        str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "3", "--validation_split", "0.3",
        "--validate_every_n_steps", "3", "--max_train_steps", "3",
    ]  # fmt: skip
    start = partial(train, script=BASES[name].script)

    def into(folder: str, *more: str) -> Finished:
        done = start([*arguments, "--output_dir", str(tmp_path / folder), *more])
        assert done.status == 0, done.stderr
        return done

    return into


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "mine.safetensors")


def are_identical(a: Path, b: Path) -> bool:
    """Return True if two runs gave the same weights and images, bit for bit."""
    ours, theirs = adapter(a), adapter(b)
    assert ours.keys() == theirs.keys() and any(weight.any() for weight in ours.values())
    images = [[np.asarray(Image.open(file)) for file in sorted(run.glob("sample/*.png"))] for run in (a, b)]
    assert len(images[0]) == len(images[1]) == 1
    return all(torch.equal(ours[key], theirs[key]) for key in ours) and np.array_equal(*images)


def test_swapped_blocks_and_offloaded_activations_do_not_change_results(
    run: Callable[..., Finished], name: str, tmp_path: Path
) -> None:
    run("plain")
    swapped = run("swapped", "--blocks_to_swap", BASES[name].blocks_to_swap, *OFFLOADED)
    assert "offloaded to main memory; without a GPU this saves nothing" in swapped.stderr
    assert are_identical(tmp_path / "plain", tmp_path / "swapped")


def test_blocks_are_swapped_in_their_stored_format(run: Callable[..., Finished], name: str, tmp_path: Path) -> None:
    form = ["--base_format", "nf4_double", "--mixed_precision", "bf16"]
    stored = run("stored", *form)
    assert "layers in nf4_double" in stored.stderr
    run("swapped", *form, "--blocks_to_swap", BASES[name].blocks_to_swap, "--gradient_checkpointing")
    assert are_identical(tmp_path / "stored", tmp_path / "swapped")


def test_a_dry_run_uses_the_requested_memory_mode(run: Callable[..., Finished], name: str, tmp_path: Path) -> None:
    done = run("dry", "--dry_run", "--blocks_to_swap", BASES[name].blocks_to_swap, "--base_format", "int8_rotated")
    assert "offloaded to main memory" in done.stderr and "layers in int8_rotated" in done.stderr
    assert not (tmp_path / "dry" / "mine.safetensors").exists()


def test_8_bit_matmul_trains_like_dequantised_weights(run: Callable[..., Finished], name: str, tmp_path: Path) -> None:
    """Losses agree within 2 %, the effect of rounding activations to 8 bits in a few layers."""
    form = ["--base_format", "int8_rotated", "--mixed_precision", "bf16"]
    decoded = run("decoded", *form)
    waiting = ["--blocks_to_swap", BASES[name].blocks_to_swap, "--gradient_checkpointing"]
    multiplied = run("multiplied", *form, "--base_arithmetic", "8bit", *waiting)
    assert re.search(r"denoiser: \d+ layers multiply in 8 bits", multiplied.stderr)
    assert ("convolutions" in multiplied.stderr) == (name in ("sd", "sdxl"))
    assert multiplied.losses == pytest.approx(decoded.losses, rel=0.02)
    assert not are_identical(tmp_path / "decoded", tmp_path / "multiplied")


def test_an_8_bit_checkpoint_trains_like_its_dequantised_weights(
    run: Callable[..., Finished], name: str, model: list[str], tmp_path: Path
) -> None:
    if name in ("sd", "sdxl"):
        pytest.skip("their files in use are not stored so")
    path = Path(model[model.index("--pretrained_model_name_or_path") + 1])
    codes, numbers = quantise_and_dequantise(load_file(path))
    save_file(codes, tmp_path / "codes.safetensors")
    save_file(numbers, tmp_path / "numbers.safetensors")
    for file in ("codes", "numbers"):
        for folder in ("tokenizer", "tokenizer_2", "t5_tokenizer"):
            if (path.parent / folder).is_dir() and not (tmp_path / folder).exists():
                (tmp_path / folder).symlink_to(path.parent / folder)
        done = run(file, "--pretrained_model_name_or_path", str(tmp_path / f"{file}.safetensors"))
        assert ("layers in 8 bits, as the file has them" in done.stderr) == (file == "codes")
    assert are_identical(tmp_path / "codes", tmp_path / "numbers")


def quantise_and_dequantise(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the state with block matrices in fp8 with a scale each, and its dequantised version."""
    codes, numbers = dict(state), dict(state)
    for key, weight in state.items():
        if weight.ndim == 2 and ("blocks." in key or key.startswith("layers.")):
            scale = weight.abs().max() / 448
            codes[key] = (weight / scale).to(torch.float8_e4m3fn)
            codes[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
            numbers[key] = codes[key].float() * scale
    return {**codes, "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, numbers


HALF = ("--mixed_precision", "bf16", "--base_format", "nf4", "--unsloth_offload_checkpointing")


@pytest.mark.parametrize("mode", [HALF, pytest.param(OFFLOADED, marks=pytest.mark.nightly)], ids=["half", "offloaded"])
def test_the_selftest_passes_and_does_not_change_training(
    run: Callable[..., Finished], name: str, mode: tuple[str, ...], tmp_path: Path
) -> None:
    done = run("tested", *mode, "--blocks_to_swap", BASES[name].blocks_to_swap, "--selftest")
    assert re.search(r"self-test: \d+ gradients in \d+ blocks equal those of the plain mode: off by 0\.0e", done.stderr)
    run("untested", *mode, "--blocks_to_swap", BASES[name].blocks_to_swap)
    assert are_identical(tmp_path / "tested", tmp_path / "untested")


def test_a_fault_found_by_the_selftest_ends_the_run_before_training(
    run: Callable[..., Finished], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.memory.offload.ring import Ring

    need = Ring.need

    def wrong_slot(ring: Ring, block: int) -> torch.Tensor:
        need(ring, block)
        return ring.streams.slots[1 - ring.held.index(block)]

    monkeypatch.setattr(Ring, "need", wrong_slot)
    with pytest.raises(AssertionError, match=r"--selftest: \d+ of \d+ gradients in \d+ blocks are not those"):
        run("wrong", "--blocks_to_swap", BASES[name].blocks_to_swap, "--selftest")
    assert not (tmp_path / "wrong" / "mine.safetensors").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "mode",
    [
        "eager",
        "8bit",
        "bare",
        "nf4, 50% of the blocks offloaded, recompute",
        "bf16, 85% of the blocks offloaded, from main memory",
    ],
)
@pytest.mark.parametrize("subject", ["sd3", "flux", "sdxl"])
def test_the_step_benchmark_runs_on_a_small_model(subject: str, mode: str) -> None:
    result = measure_step("--models", subject, "--modes", mode)
    assert result["seconds"] > 0 and result["trained"] > 1000
    assert (result["flops"] > 0) == (mode == "eager")


def test_the_step_benchmark_takes_a_size_and_computes_in_float32() -> None:
    words = ["--models", "sd15", "--modes", "eager", "--float32"]
    results = [measure_step(*words, *more) for more in ((), ("--pixels", "128"))]
    assert results[1]["flops"] > 3 * results[0]["flops"] > 0  # of 64 pixels


def measure_step(*words: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks", "gpu_step", "--device", "cpu", "--tiny", "--child", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result
