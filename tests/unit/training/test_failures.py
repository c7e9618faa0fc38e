"""What a run saves when it fails, the message when memory runs out, and settings of CUDA's kernels."""

import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from library.base.determinism import deterministic
from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from library.memory.devices import bytes_of
from library.options.machine.kernels import KernelOptions
from library.options.no_effect import find_unused
from library.options.output.saving import HubOptions
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
from library.training.reporting.progress import Progress
from library.training.saving import checkpoints, rescue
from library.training.saving.checkpoints import SavedElsewhere, Writer
from library.training.saving.hub import Uploads
from library.training.saving.names import Names
from library.training.saving.rescue import NotWrittenError, places, write_somewhere
from library.training.saving.schedule import Schedule
from library.training.saving.state import MANIFEST_FILE
from networks.core.protocol import AdoptedNetwork
from tests.running import Finished
from tests.unit.training.test_checks import make_options


class Network(torch.nn.Module):
    """A network that writes one tensor and fails for paths for which `refuses` is true."""

    def __init__(self, refuses: Callable[[Path], bool] = lambda path: False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))
        self.refuses = refuses

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        if self.refuses(Path(file)):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_safetensors(file, {"weight": self.weight.detach()}, metadata)


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an --output_dir outside the folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "above" / "out").mkdir(parents=True)
    return tmp_path / "above" / "out"


def writer_to(output: Path, network: Network, **state: Any) -> Writer:
    hashes: Future[dict[str, str]] = Future()
    hashes.set_result({})

    def write_state(folder: Path, step: int, epoch: int, done: Collection[str]) -> None:
        if network.refuses(folder):
            raise OSError(28, "No space left on device")
        folder.mkdir()
        (folder / MANIFEST_FILE).write_text(" ".join(sorted(done)))

    return Writer(
        options=TrainOptions().with_values({"output_dir": str(output), "output_name": "x", **state}),
        is_main=True,
        names=Names(output, "x", "safetensors"),
        schedule=Schedule(1, None, 1, None, 1),
        network=AdoptedNetwork(network),
        architecture={},
        metadata={"ss_network_module": "networks.lora"},
        base_files=hashes,
        saved_weights=nullcontext,
        write_state=write_state,
        uploads=Uploads(HubOptions()),
    )


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fallback_paths_are_ordered_and_replace_no_file(output: Path) -> None:
    (output / "x-rescued.safetensors").touch()
    (output / "x-rescued-2.safetensors").touch()
    assert list(places(output / "x.safetensors", ".safetensors")) == [
        output / "x.safetensors",
        output / "x-rescued-3.safetensors",
        output.parent / "x-rescued.safetensors",
        Path(tempfile.gettempdir()) / "x-rescued.safetensors",
    ]


def test_a_file_that_cannot_be_replaced_is_saved_under_another_name(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, plain = output / "x.safetensors", os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise PermissionError(1, "Operation not permitted")
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SavedElsewhere, match=r"training is complete, but .*x\.safetensors could not be written"):
        writer_to(output, Network()).save_end(Progress(3), 1)
    assert files_below(output.parent) == {"out/x-rescued.safetensors"}
    assert load_state_dict(output / "x-rescued.safetensors")["weight"].tolist() == [0, 1, 2, 3]
    assert f"{path} ([Errno 1] Operation not permitted) cannot be written; it is saved as {output}" in caplog.text


def test_on_a_full_disk_weights_are_saved_to_the_temporary_folder(
    output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_to(output, Network(lambda path: path.is_relative_to(output.parent)))
    for step in (1, 2, 3):
        writer.save_after_step(Progress(step), 1)
    assert files_below(output.parent) == set()
    assert files_below(Path(tempfile.gettempdir())) == {"x-step00000003-rescued.safetensors"}, "only the newest stays"
    assert caplog.text.count("No space left on device") == 3


def test_a_foreign_file_with_the_name_of_an_outdated_one_is_not_deleted(output: Path) -> None:
    writer = writer_to(output, Network(), save_state=True)
    for step in (1, 2):
        writer.save_after_step(Progress(step), 1)
    save_safetensors(output / "x-step00000001.safetensors", {"model.out": torch.ones(1)})
    state = output / "x-step00000001-state"
    (state / "notes.txt").write_text("mine")
    for step in (3, 4):
        writer.save_after_step(Progress(step), 1)
    remaining = {"x-step00000001.safetensors", "x-step00000003.safetensors", "x-step00000004.safetensors"}
    assert {path.name for path in output.glob("*.safetensors")} == remaining
    assert (state / "notes.txt").read_text() == "mine" and not (output / "x-step00000002-state").exists()


def test_no_older_file_is_deleted_if_the_newer_one_was_saved_elsewhere(output: Path) -> None:
    writer = writer_to(output, Network(lambda path: "step00000003." in path.name))  # including its temporary name
    for step in (1, 2, 3):
        writer.save_after_step(Progress(step), 1)
    remaining = {"x-step00000001.safetensors", "x-step00000002.safetensors", "x-step00000003-rescued.safetensors"}
    assert files_below(output) == remaining
    writer.save_after_step(Progress(4), 1)
    assert "x-step00000002.safetensors" not in files_below(output)


def test_training_continues_if_no_path_is_writable(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = writer_to(output, Network(lambda path: True), save_state=True)
    progress = Progress(1)
    writer.save_after_step(progress, 1)
    assert "cannot be written anywhere" in caplog.text and "training continues" in caplog.text
    assert not progress.done
    with pytest.raises(NotWrittenError, match=r"x\.safetensors cannot be written anywhere: .*out/x\.saf.*x-rescued"):
        writer.save_end(progress, 1)


def test_a_state_that_cannot_be_saved_is_reported_with_a_way_to_continue(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = writer_to(output, Network(lambda path: path == output / "x-step00000007-state"))
    writer.save_interrupted(Progress(7), 1)
    place = output / "x-step00000007-state-rescued"
    assert (place / MANIFEST_FILE).is_file()
    assert f"give the same command with --resume {place}\n" in capsys.readouterr().out


def test_a_state_saved_with_rescued_weights_does_not_count_them_as_written(output: Path) -> None:
    writer = writer_to(output, Network(lambda path: "step00000001." in path.name), save_state=True)
    writer.save_after_step(Progress(1), 1)
    assert (output / "x-step00000001-state" / MANIFEST_FILE).read_text() == ""


def test_free_space_is_checked_before_writing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {output: 100, output.parent: 2000}
    monkeypatch.setattr(rescue.shutil, "disk_usage", lambda folder: SimpleNamespace(total=9999, free=usage[folder]))
    written: list[Path] = []
    place = write_somewhere(output / "x.ckpt", ".ckpt", 1500, written.append)
    assert written == [place] == [output.parent / "x-rescued.ckpt"]


def test_a_drive_that_reports_no_free_space_is_tried(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescue.shutil, "disk_usage", lambda folder: SimpleNamespace(total=0, free=0))
    assert write_somewhere(output / "x.ckpt", ".ckpt", 1500, Path.touch) == output / "x.ckpt"


def test_the_run_does_not_start_if_its_file_does_not_fit(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 15)
    with pytest.raises(ValueError, match=r"--output_dir .*: 0\.0 MB are free on its disk, and the adapter takes"):
        writer_to(output, Network()).check_space()


def test_a_run_whose_files_do_not_all_fit_starts_with_a_warning(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 16 * 3)
    writer_to(output, Network(), max_train_steps=2).check_space()
    assert not caplog.records
    writer_to(output, Network(), max_train_steps=90).check_space()  # three at a time, and the last one
    assert "4 files of 0.0 MB" in caplog.text and "--save_last_n_steps" in caplog.text


def test_a_base_model_that_cannot_be_hashed_only_omits_the_hash(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone: Future[dict[str, str]] = Future()
    gone.set_exception(OSError(5, "Input/output error"))
    writer = writer_to(output, Network())
    with caplog.at_level(logging.WARNING):
        writer.__class__(**{**vars(writer), "base_files": gone}).save_end(Progress(1), 1)
    assert files_below(output) == {"x.safetensors"} and "the base model cannot be hashed" in caplog.text


# The message when memory runs out, and settings of CUDA's kernels.

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
