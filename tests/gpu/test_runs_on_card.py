"""Every base model trained by its script on a CUDA card in half precision, beside the same run on the CPU."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.gpu.card import CARD_ONLY, CPU_STANDS_IN, ON_CARD
from tests.running import ROOT, Finished
from tests.runs.bases import BASES

pytestmark = ON_CARD
# One step of SGD from zero is the gradient. bfloat16 keeps 8 bits of each product's factors: over a dozen layers two
# orders of sums differ by some per cent of a gradient's size, and of the loss by less. float16 keeps 11 bits.
OF_GRADIENT, OF_LOSS = {"bf16": 0.1, "fp16": 0.02}, 0.02
Train = Callable[..., Finished]


@pytest.fixture
def on_card(train: Train, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains on the card, or on what stands in for it."""
    if CPU_STANDS_IN:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # else accelerate takes a card where there is one
    return train


def on_cpu(train: Train, arguments: list[str], script: str) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(arguments, script=script)


def saved(tmp_path: Path, name: str) -> dict[str, Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "flux" else pytest.mark.slow) for name in BASES]
)
def test_trains_in_half_precision(
    name: str, precision: str, base_arguments: list[str], tmp_path: Path, on_card: Train
) -> None:
    """fp16 with its scaler is compared with float32 on the CPU: two roundings to 8 bits would add up."""
    if CPU_STANDS_IN and precision == "fp16":
        pytest.skip("fp16 needs a card")
    base = BASES[name]
    arguments = [
        *base_arguments, *base.build(tmp_path / "model"), "--network_module", base.module, "--network_train_unet_only",
        "--gradient_checkpointing", "--optimizer_type", "SGD", "--optimizer_args", "momentum=0", "--max_train_steps",
        "1", *(["--fp8_base_unet"] if precision == "bf16" else []),
    ]  # fmt: skip
    reference = "bf16" if precision == "bf16" else "no"
    card = on_card([*arguments, "--mixed_precision", precision, "--output_name", "card"], script=base.script)
    cpu = on_cpu(on_card, [*arguments, "--mixed_precision", reference, "--output_name", "cpu"], base.script)
    assert card.status == cpu.status == 0, card.stderr + cpu.stderr
    assert math.isclose(card.losses[0], cpu.losses[0], rel_tol=OF_LOSS)
    ours, theirs = saved(tmp_path, "card"), saved(tmp_path, "cpu")
    ups = [key for key in theirs if "lora_up" in key or "lora_B" in key]
    off = torch.cat([(ours[key] - theirs[key]).float().flatten() for key in ups]).norm()
    size = torch.cat([theirs[key].float().flatten() for key in ups]).norm()
    assert size > 0 and off <= OF_GRADIENT[precision] * size


@pytest.mark.real_kernels
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_optimizers_in_8_bits_train(optimizer: str, base_arguments: list[str], tmp_path: Path, on_card: Train) -> None:
    done = on_card([*base_arguments, "--optimizer_type", optimizer, "--mixed_precision", "bf16"])
    assert done.status == 0, done.stderr
    assert len(done.losses) == 4 and all(math.isfinite(loss) for loss in done.losses)
    assert any(weight.any() for key, weight in saved(tmp_path, "mine").items() if "lora_up" in key)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(base_arguments: list[str], tmp_path: Path, on_card: Train) -> None:
    """With --deterministic, bit for bit."""
    common = [*base_arguments, "--mixed_precision", "bf16", "--network_dropout", "0.1", "--deterministic"]
    for name, extra in (
        ("whole", []),
        ("half", ["--max_train_steps", "2", "--save_state"]),
        ("resumed", ["--resume", str(tmp_path / "out" / "half-state")]),
    ):
        done = on_card([*common, *extra, "--output_name", name])
        assert done.status == 0, done.stderr
    ours, theirs = saved(tmp_path, "resumed"), saved(tmp_path, "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_previews_and_validation(base_arguments: list[str], tmp_path: Path, on_card: Train) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --w 64 --h 64 --s 2 --d 1\n")
    extra = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--validation_split", "0.3"]
    done = on_card([*base_arguments, *extra, "--validate_every_n_steps", "2", "--mixed_precision", "bf16"])
    assert done.status == 0, done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2


def test_a_step_that_is_not_finite_is_skipped(
    base_arguments: list[str], tmp_path: Path, on_card: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.step import losses

    losses_of, seen = losses.compute_losses, []

    def broken(*given: object, **named: object) -> Tensor:
        seen.append(None)
        losses_B: Tensor = losses_of(*given, **named)  # type: ignore[arg-type]
        return losses_B * float("nan") if len(seen) == 2 else losses_B

    monkeypatch.setattr(losses, "compute_losses", broken)
    done = on_card([*base_arguments, "--mixed_precision", "bf16"])
    assert done.status == 0 and "1 of 4 steps were skipped" in done.stderr
    assert all(weight.isfinite().all() for weight in saved(tmp_path, "mine").values())


@pytest.mark.slow
def test_a_mode_tests_itself(base_arguments: list[str], tmp_path: Path, on_card: Train) -> None:
    mode = ["--blocks_to_swap", "9", "--unsloth_offload_checkpointing", "--base_format", "nf4", "--selftest"]
    done = on_card([*base_arguments, *mode, "--mixed_precision", "bf16"])
    assert done.status == 0 and "equal those of the plain mode" in done.stderr, done.stderr


@CARD_ONLY
def test_too_little_memory_is_explained(base_arguments: list[str], on_card: Train) -> None:
    torch.cuda.init()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
    try:
        done = on_card([*base_arguments, "--train_batch_size", "64", "--resolution", "512", "--dry_run"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.status == 1
    assert "out of memory while" in done.stderr and "to save memory: --gradient_checkpointing" in done.stderr


@pytest.mark.real_kernels
@CARD_ONLY
def test_xformers_trains_where_it_is_installed(base_arguments: list[str], on_card: Train) -> None:
    pytest.importorskip("xformers")
    done = on_card([*base_arguments, "--xformers", "--mixed_precision", "bf16"])
    assert done.status == 0, done.stderr


@pytest.mark.real_kernels
@CARD_ONLY
def test_one_process_of_nccl_trains_as_without(base_arguments: list[str], tmp_path: Path, on_card: Train) -> None:
    words = [*base_arguments, "--deterministic"]
    alone = on_card([*words, "--output_name", "alone"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    line = [*command, str(ROOT / "train_network.py"), *words, "--output_name", "nccl"]
    done = subprocess.run(line, capture_output=True, timeout=300)
    assert alone.status == done.returncode == 0, done.stderr.decode()
    ours, theirs = saved(tmp_path, "nccl"), saved(tmp_path, "alone")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
