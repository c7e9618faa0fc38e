"""Memory-saving options and compiled blocks give the images and adapters of a run without them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from library.memory.offload.readback import Readback
from library.processes.process_group import Processes
from library.training.command_line import training
from library.training.loop.update import Updates
from library.training.models import frozen_base
from tests.device_reads import HostWaits, NoWaiting
from tests.device_standin import OnDevice, device_without_float64
from tests.running import ROOT, Finished, make_images, small_run
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
        done = start([*arguments, "--output_dir", str(tmp_path / folder), *more]).ok()
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


# Adapter kinds that depend on noise levels or weights train the same with recomputed and swapped blocks.

KINDS = {
    "T-LoRA on split projections": ["networks.tlora", "--network_args", "split_qkv=True", "tlora_min_rank=2"],
    "OLoRA": ["networks.lora", "--network_args", "init=olora"],
    "GGPO": ["networks.lora", "--network_args", "ggpo_sigma=0.05", "ggpo_beta=0.05"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_swapped_and_recomputed_blocks_do_not_change_results(
    train: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(frozen_base, "NUM_STAYING", 1)  # of the two blocks of a tiny model
    make_images(tmp_path / "data" / "1_thing", 2)
    base = BASES["sd3"]
    words = [
        *base.build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt",
        "--resolution", "64", "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--network_dim", "4",
        "--max_train_steps", "3", "--seed", "3", "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0",
        "--network_train_unet_only", "--network_module", *KINDS[kind],
    ]  # fmt: skip
    saved = {}
    for name, more in {"plain": [], "saving": ["--gradient_checkpointing", "--blocks_to_swap", "1"]}.items():
        train([*words, "--output_name", name, *more], base.script).ok()
        saved[name] = load_file(tmp_path / "out" / f"{name}.safetensors")
    for key, weight in saved["plain"].items():
        torch.testing.assert_close(saved["saving"][key], weight, rtol=1e-4, atol=1e-5)  # float32 sums in another order


# sd-scripts' options of block swapping on a run's command line.


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training of SD3, which sd-scripts refuses to swap without copying back, without gradient checkpointing."""
    monkeypatch.setattr(frozen_base, "NUM_STAYING", 1)  # of the two blocks of a tiny model
    make_images(tmp_path / "data" / "1_thing", 2)
    return [
        *BASES["sd3"].build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--resolution", "64",
        "--caption_extension", ".txt", "--output_dir", str(tmp_path / "out"), "--network_module",
        "networks.lora_generic", "--network_train_unet_only", "--network_dim", "4", "--max_train_steps", "2",
        "--seed", "3", "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


def test_a_ring_of_any_size_trains_the_same_and_the_other_options_warn_once(
    train: Callable[..., Finished], tmp_path: Path, words: list[str]
) -> None:
    words = [*words, "--guidance_loss", "2"]  # whose second pass reads the blocks once more
    swap = ["--blocks_to_swap", "1", "--block_swap_h2d_only", "--use_pinned_memory_for_block_swap"]
    for size in ("1", "3"):
        done = train([*words, "--output_name", size, *swap, "--block_swap_ring_size", size], BASES["sd3"].script).ok()
        log = " ".join(done.stderr.split())
        assert log.count("--block_swap_h2d_only has no effect: swapped blocks are frozen and always only copied") == 1
        assert log.count("--use_pinned_memory_for_block_swap has no effect: swapped blocks are in pinned memory") == 1
        assert "--block_swap_ring_size has no effect" not in log
    one, three = (load_file(tmp_path / "out" / f"{size}.safetensors") for size in ("1", "3"))
    assert any(weight.abs().sum() for key, weight in one.items() if "lora_up" in key)
    assert one.keys() == three.keys() and all(torch.equal(three[key], weight) for key, weight in one.items())


@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_ring_without_a_slot_is_refused(train: Callable[..., Finished], words: list[str], size: str) -> None:
    done = train([*words, "--blocks_to_swap", "1", "--block_swap_ring_size", size], BASES["sd3"].script)
    assert done.status == 1 and f"--block_swap_ring_size is {size}; use at least 1" in done.stderr


# In each step of a run the host waits for the device only once, to read the results of the previous step.

NUM_STEPS = 5
VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


class NoReading(NoWaiting):
    """A mode that rejects blocking copies and reading values of tensors on the device."""

    is_on = False
    num_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_on:
            return func(*args, **(kwargs or {}))
        if func in VALUES and any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs))):
            raise HostWaits(f"{func} of a tensor on the device")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def tolist(self, tensor: OnDevice) -> Any:
        if self.is_on:
            raise HostWaits("tolist of a tensor on the device")
        return tensor.inner.tolist()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        before, self.is_on = self.is_on, False
        self.num_reads += before
        try:
            yield
        finally:
            self.is_on = before


@pytest.mark.nightly  # the fast tier covers the steps of every base model
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--ema_decay", "0.9", "--scale_weight_norms", "0.01"], id="plain"),
        pytest.param(
            ["--cache_latents", "--network_train_unet_only", "--gradient_accumulation_steps", "2"], id="accumulated"
        ),
    ],
)
def test_a_run_waits_for_the_device_once_per_step(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Watch the steps between the first, which creates shared tensors, and the last."""
    watch = NoReading()
    take, read = Updates.apply, Readback.read

    def watched_take(updates: Updates, window: Any, losses: Any) -> None:
        watch.is_on = watch.is_on and window.step + 1 < NUM_STEPS
        take(updates, window, losses)
        watch.is_on = window.step + 1 < NUM_STEPS

    def watched_read(readback: Readback) -> list[float]:
        with watch.allowed():
            return read(readback)

    monkeypatch.setattr(Updates, "apply", watched_take)
    monkeypatch.setattr(Readback, "read", watched_read)
    monkeypatch.setattr(OnDevice, "tolist", lambda tensor: watch.tolist(tensor))
    with device_without_float64() as device, watch:
        monkeypatch.setattr(training, "from_accelerator", lambda accelerator: Processes(device=device))
        done = train([*base_arguments, *more, "--max_train_steps", str(NUM_STEPS)])
    assert "skipped" not in done.stderr, "a damaged step is explained, for which values are asked"
    assert done.status == 0, done.stderr
    assert watch.num_reads >= NUM_STEPS - 1


# Compilations of a whole run: as many as there are kinds of blocks, regardless of captions and sizes.

TOGETHER = (
    "--gradient_checkpointing", "--network_args", "dora_wd=True", "--base_format", "int8", "--base_arithmetic", "8bit",
    "--compile", "--compile_backend", "eager", "--no_report", "--train_batch_size", "1",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("zimage", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in BASES if name != "zimage"),
    ],
)
def test_captions_and_buckets_add_no_compilation(name: str, train: Callable[..., Finished], tmp_path: Path) -> None:
    from torch import _dynamo

    base = BASES[name]
    model, graphs = base.build(tmp_path / "model"), []
    for folder, lengths, sizes in (("one", [3], [(64, 64)]), ("many", [1, 70], [(64, 64), (128, 64)])):
        images = make_images(tmp_path / folder / "1_thing", len(lengths) * len(sizes))
        for number, path in enumerate(sorted(images.glob("*.png"))):
            Image.open(path).resize(sizes[number % len(sizes)]).save(path)
            path.with_suffix(".txt").write_text("red " * lengths[number // len(sizes)])
        _dynamo.reset()
        _dynamo.utils.counters.clear()
        # The first step of each shape is uncompiled, because its operations are counted.
        words = small_run(tmp_path / folder, tmp_path, base.module, str(2 * len(lengths) * len(sizes)))
        train([*model, *words, *TOGETHER, "--enable_bucket", "--min_bucket_reso", "64"], script=base.script).ok()
        graphs.append(_dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] <= graphs[0]


@pytest.mark.nightly
def test_compiling_the_blocks_of_sdxl_leaves_few_generated_kernels() -> None:
    words = [sys.executable, "-m", "benchmarks", "compiled_blocks"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    rows = [[int(cell) for cell in line.split("|")[2:6]] for line in lines]
    *kinds, (num_blocks, eager, generated, called) = rows
    assert num_blocks == 87 and all(row[1] > row[2] + row[3] for row in kinds)
    assert generated < called < generated + called < 0.8 * eager
