"""Every base model trained by its script on a CUDA GPU in half precision, compared with the run on the CPU."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.gpu.device import GPU_ONLY, ON_GPU, RUNS_ON_CPU
from tests.running import ROOT, Finished
from tests.tiny.bases import BASES

pytestmark = ON_GPU
# One SGD step from zero equals the gradient. bfloat16 keeps 8 bits of each factor: over a dozen layers two summation
# orders differ by a few percent of a gradient's size, and by less of the loss. float16 keeps 11 bits.
OF_GRADIENT, OF_LOSS = {"bf16": 0.1, "fp16": 0.02}, 0.02
# In fp16 runs text encoders that overflow float16 run in bfloat16. MOSS-Image differs by 5.4 % (with its encoder in
# float32 by less than 2 %), FLUX.2 by 2.2 %, Krea 2 by 1.3 %, others by less than 1 %.
OF_GRADIENT_OF_BASE = {("flux_2", "fp16"): 0.03, ("moss_image", "fp16"): 0.06}
Train = Callable[..., Finished]


@pytest.fixture
def train_on_gpu(train: Train, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Return `train` for the GPU, or for the device that replaces it."""
    if RUNS_ON_CPU:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # otherwise accelerate uses a GPU if there is one
    return train


def train_on_cpu(train: Train, arguments: list[str], script: str) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(arguments, script=script)


def load_saved(tmp_path: Path, name: str) -> dict[str, Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "flux" else pytest.mark.slow) for name in BASES]
)
def test_training_in_half_precision_matches_the_cpu(
    name: str, precision: str, base_arguments: list[str], tmp_path: Path, train_on_gpu: Train
) -> None:
    """fp16 with its loss scaler is compared with float32 on the CPU, as two roundings to 8 bits would accumulate."""
    if RUNS_ON_CPU and precision == "fp16":
        pytest.skip("fp16 needs a card")
    base = BASES[name]
    arguments = [
        *base_arguments, *base.build(tmp_path / "model"), "--network_module", base.module, "--network_train_unet_only",
        "--gradient_checkpointing", "--optimizer_type", "SGD", "--optimizer_args", "momentum=0", "--max_train_steps",
        "1", *(["--fp8_base_unet"] if precision == "bf16" else []),
    ]  # fmt: skip
    reference = "bf16" if precision == "bf16" else "no"
    gpu = train_on_gpu([*arguments, "--mixed_precision", precision, "--output_name", "card"], script=base.script)
    cpu = train_on_cpu(train_on_gpu, [*arguments, "--mixed_precision", reference, "--output_name", "cpu"], base.script)
    assert gpu.status == cpu.status == 0, gpu.stderr + cpu.stderr
    assert math.isclose(gpu.losses[0], cpu.losses[0], rel_tol=OF_LOSS)
    ours, theirs = load_saved(tmp_path, "card"), load_saved(tmp_path, "cpu")
    ups = [key for key in theirs if "lora_up" in key or "lora_B" in key]
    off = torch.cat([(ours[key] - theirs[key]).float().flatten() for key in ups]).norm()
    size = torch.cat([theirs[key].float().flatten() for key in ups]).norm()
    assert size > 0 and off <= OF_GRADIENT_OF_BASE.get((name, precision), OF_GRADIENT[precision]) * size


@pytest.mark.real_kernels
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_8_bit_optimizers_train(optimizer: str, base_arguments: list[str], tmp_path: Path, train_on_gpu: Train) -> None:
    done = train_on_gpu([*base_arguments, "--optimizer_type", optimizer, "--mixed_precision", "bf16"]).ok()
    assert len(done.losses) == 4 and all(math.isfinite(loss) for loss in done.losses)
    assert any(weight.any() for key, weight in load_saved(tmp_path, "mine").items() if "lora_up" in key)


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(
    base_arguments: list[str], tmp_path: Path, train_on_gpu: Train
) -> None:
    """With --deterministic they are equal bit for bit."""
    common = [*base_arguments, "--mixed_precision", "bf16", "--network_dropout", "0.1", "--deterministic"]
    for name, extra in (
        ("whole", []),
        ("half", ["--max_train_steps", "2", "--save_state"]),
        ("resumed", ["--resume", str(tmp_path / "out" / "half-state")]),
    ):
        train_on_gpu([*common, *extra, "--output_name", name]).ok()
    ours, theirs = load_saved(tmp_path, "resumed"), load_saved(tmp_path, "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_previews_and_validation_work(base_arguments: list[str], tmp_path: Path, train_on_gpu: Train) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --w 64 --h 64 --s 2 --d 1\n")
    extra = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3"]
    train_on_gpu([*base_arguments, *extra, "--validate_every_n_steps", "2", "--mixed_precision", "bf16"]).ok()
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2


def test_a_step_with_nan_is_skipped(
    base_arguments: list[str], tmp_path: Path, train_on_gpu: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.step import losses

    losses_of, finite_losses = losses.compute_losses, []

    def broken(*given: object, **named: object) -> Tensor:
        finite_losses.append(None)
        losses_B: Tensor = losses_of(*given, **named)  # type: ignore[arg-type]
        return losses_B * float("nan") if len(finite_losses) == 2 else losses_B

    monkeypatch.setattr(losses, "compute_losses", broken)
    done = train_on_gpu([*base_arguments, "--mixed_precision", "bf16"])
    assert done.status == 0 and "1 of 4 steps were skipped" in done.stderr
    assert all(weight.isfinite().all() for weight in load_saved(tmp_path, "mine").values())


@pytest.mark.slow
def test_the_selftest_of_a_memory_mode_passes(base_arguments: list[str], tmp_path: Path, train_on_gpu: Train) -> None:
    mode = ["--blocks_to_swap", "9", "--unsloth_offload_checkpointing", "--base_format", "nf4", "--selftest"]
    done = train_on_gpu([*base_arguments, *mode, "--mixed_precision", "bf16"])
    assert done.status == 0 and "equal those of the plain mode" in done.stderr, done.stderr


@GPU_ONLY
def test_running_out_of_memory_is_explained(base_arguments: list[str], train_on_gpu: Train) -> None:
    torch.cuda.init()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
    try:
        done = train_on_gpu([*base_arguments, "--train_batch_size", "64", "--resolution", "512", "--dry_run"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.status == 1
    assert "out of memory while" in done.stderr and "to save memory: --gradient_checkpointing" in done.stderr


@pytest.mark.real_kernels
@GPU_ONLY
def test_xformers_trains_where_it_is_installed(base_arguments: list[str], train_on_gpu: Train) -> None:
    pytest.importorskip("xformers")
    train_on_gpu([*base_arguments, "--xformers", "--mixed_precision", "bf16"]).ok()


@pytest.mark.real_kernels
@GPU_ONLY
def test_a_single_nccl_process_trains_as_without_nccl(
    base_arguments: list[str], tmp_path: Path, train_on_gpu: Train
) -> None:
    words = [*base_arguments, "--deterministic"]
    alone = train_on_gpu([*words, "--output_name", "alone"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    line = [*command, str(ROOT / "train_network.py"), *words, "--output_name", "nccl"]
    done = subprocess.run(line, capture_output=True, timeout=300)
    assert alone.status == done.returncode == 0, done.stderr.decode()
    ours, theirs = load_saved(tmp_path, "nccl"), load_saved(tmp_path, "alone")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
