"""The message when memory runs out, and settings of CUDA's kernels."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from library.base.determinism import deterministic
from library.memory.devices import bytes_of
from library.options.machine.kernels import KernelOptions
from library.options.no_effect import find_unused
from library.options.train import TrainOptions
from library.training.command_line import training
from library.training.failures.out_of_memory import (
    OutOfMemoryError,
    Sizes,
    explain_out_of_memory,
    find_savings,
    is_out_of_memory,
)
from library.training.models.cuda_kernels import cuda_kernels
from tests.running import Finished
from tests.unit.training.test_checks import make_options

CPU = torch.device("cpu")


def allocate_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def test_an_impossible_allocation_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failed:
        allocate_too_much()
    assert is_out_of_memory(failed.value)


GPU_LACKS = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
PIN_REFUSED = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
CPU_LACKS = RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("error", "free", "is_of_host"),
    [
        (GPU_LACKS, 8, False),
        (CPU_LACKS, 0, True),
        (MemoryError(), 0, True),
        (PIN_REFUSED, 8, True),
        (PIN_REFUSED, 0, False),
    ],
)
def test_a_run_on_a_gpu_that_lacks_main_memory_says_so(
    error: Exception, free: int, is_of_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA reports main memory that cannot be pinned in the words that it has for its own."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 8 << 30))
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 1 << 30)
    options = make_options(
        blocks_to_swap=2, gradient_checkpointing=True, cpu_offload_checkpointing=True, cache_latents=True
    )
    with pytest.raises(OutOfMemoryError) as failed:
        with explain_out_of_memory("computing step 3", options, torch.device("cuda"), "2 images of 64x64"):
            raise error
    text = str(failed.value)
    assert text.startswith("out of main memory while computing step 3\n  main memory: peak ") == is_of_host
    for advice in ("a smaller --blocks_to_swap", "without --cpu_offload_checkpointing", "--cache_latents_to_disk"):
        assert (f"to save main memory: {advice}" in text) == is_of_host
    assert ("--base_format int8" in text) != is_of_host and ("taken from the GPU" in text) != is_of_host


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_errors_of_gpus_and_of_python_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "message",
    [
        "GET was unable to find an engine to execute this computation",
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1154, please report a bug',
    ],
)
def test_an_ambiguous_error_is_reported_as_likely_out_of_memory(message: str) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"^probably out of memory while training, a batch\n") as failed,
        explain_out_of_memory("training", make_options(), CPU, "a batch"),
    ):
        raise RuntimeError(message)
    assert f"the error itself: {message}" in str(failed.value)


def test_any_other_error_passes_unchanged() -> None:
    with (
        pytest.raises(RuntimeError, match=r"^shapes do not fit$"),
        explain_out_of_memory("training", make_options(), CPU, "a batch"),
    ):
        raise RuntimeError("shapes do not fit")


def test_the_message_names_the_operation_and_the_batch() -> None:
    doing = explain_out_of_memory("computing step 3", make_options(), CPU, "4 images of 768x512")
    with pytest.raises(OutOfMemoryError, match="out of memory while computing step 3, 4 images of 768x512"), doing:
        allocate_too_much()


def test_encoding_captions_names_the_options_of_text_encoders() -> None:
    from library.architectures.flux.options import FluxOptions

    options = FluxOptions().with_values({"cache_text_encoder_outputs": True, "text_encoder_batch_size": 4})
    lines = "\n".join(find_savings(options.flat(), Sizes(), CPU))
    assert "--text_encoder_cpu encodes captions on the CPU" in lines and "--text_encoder_batch_size 1" in lines
    lines = "\n".join(find_savings({**options.flat(), "text_encoder_cpu": True}, Sizes(), CPU))
    assert "--text_encoder" not in lines
    assert "--text_encoder_cpu" not in "\n".join(
        find_savings(options.flat(), Sizes(num_trained=5), CPU)
    )  # during a step
    lines = "\n".join(find_savings(FluxOptions().flat(), Sizes(), CPU))  # captions are encoded one by one
    assert "--text_encoder_cpu" in lines and "--text_encoder_batch_size" not in lines


def test_options_already_in_use_are_not_advised() -> None:
    """Savings: 2 of 4 MB by half precision, all of the VAE, 6 of AdamW's 8 bytes per parameter."""
    sizes = Sizes(denoiser=2_000_000, text_encoders=1_000_000, vae=1_000_000, num_trained=500_000)
    lines = "\n".join(find_savings(make_options(train_batch_size=4).flat(), sizes, CPU))
    assert "--mixed_precision bf16 halves models and activations: 2.0 MB less" in lines
    assert "--cache_latents lets the VAE leave before training: 1.0 MB less" in lines
    assert "AdamW8bit keeps the optimizer's memory in 8 bits: 3.0 MB less" in lines
    assert "--train_batch_size 2 needs 50% of the activations" in lines
    used = make_options(
        gradient_checkpointing=True,
        cache_latents=True,
        mixed_precision="bf16",
        optimizer_type="AdamW8bit",
        network_train_unet_only=True,
    )
    lines = "\n".join(find_savings(used.flat(), sizes, CPU))
    for option in ("--gradient_checkpointing", "--cache_latents", "--mixed_precision", "--optimizer_type", "--train"):
        assert option not in lines


def test_predicted_savings_replace_advice_without_figures() -> None:
    predicted = "--gradient_checkpointing needs 3.0 GiB less and takes 33 % longer"
    with (
        pytest.raises(OutOfMemoryError) as failed,
        explain_out_of_memory("computing step 3", make_options(), CPU, "a batch", memory_hints=lambda: [predicted]),
    ):
        allocate_too_much()
    lines = str(failed.value).splitlines()
    assert lines[2] == f"  to save memory: {predicted} (predicted)"
    assert sum("--gradient_checkpointing" in line for line in lines) == 1
    assert not any("--base_format" in line or "--blocks_to_swap" in line for line in lines)
    assert any("--mixed_precision bf16" in line for line in lines)


def test_the_bytes_of_a_model_are_those_of_its_weights() -> None:
    assert bytes_of(nn.Linear(10, 10).to(torch.bfloat16)) == 110 * 2


# --cuda_allow_tf32 and --cuda_cudnn_benchmark configure torch for the duration of the run.


def settings() -> tuple[bool, bool, bool]:
    """Return the settings of TF32 matmul, TF32 convolution and cuDNN benchmarking."""
    backends = torch.backends
    return (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark)


def set_all(values: tuple[bool, bool, bool]) -> None:
    backends = torch.backends
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = values


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Use full precision; torch's default allows TF32 convolutions."""
    before = settings()
    set_all((False, False, False))
    yield
    set_all(before)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(
    ("options", "inside"),
    [
        (KernelOptions(), (False, False, False)),
        (KernelOptions(cuda_allow_tf32=True), (True, True, False)),
        (KernelOptions(cuda_cudnn_benchmark=True), (False, False, True)),
    ],
)
def test_torch_is_configured_inside_the_context_and_restored_after_an_error(
    options: KernelOptions, inside: tuple[bool, bool, bool]
) -> None:
    with pytest.raises(ZeroDivisionError), cuda_kernels(options):
        assert settings() == inside
        raise ZeroDivisionError
    assert settings() == (False, False, False)


@pytest.mark.usefixtures("full_precision")
def test_deterministic_overrides_cudnn_benchmarking_and_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with cuda_kernels(KernelOptions(cuda_allow_tf32=True, cuda_cudnn_benchmark=True)), deterministic(True):
        assert settings() == (True, True, False)
    both = TrainOptions().with_values({"deterministic": True, "cuda_cudnn_benchmark": True})
    assert "--cuda_cudnn_benchmark has no effect with --deterministic" in [*find_unused(both, {})]


def test_a_machine_without_a_gpu_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING), cuda_kernels(KernelOptions()):
        assert not caplog.messages
    with caplog.at_level(logging.WARNING), cuda_kernels(KernelOptions(cuda_allow_tf32=True)):
        assert caplog.messages == ["--cuda_allow_tf32: no effect, as torch finds no CUDA GPU"]


@pytest.mark.slow
@pytest.mark.usefixtures("full_precision")
def test_a_run_uses_the_settings(
    train: Callable[..., Finished], base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_seen, real = [], training.train

    def watched(*arguments: object) -> None:
        settings_seen.append(settings())
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", watched)
    words = ["--cuda_allow_tf32", "--cuda_cudnn_benchmark", "--max_train_steps", "1"]
    assert train([*base_arguments, *words]).status == 0
    assert settings_seen == [(True, True, True)] and settings() == (False, False, False)
