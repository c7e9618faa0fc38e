"""Out-of-memory errors that say what was being done, how much memory there was, and which options save how much."""

import errno
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from library.base.errors import UserError
from library.base.formatting import format_bytes
from library.memory.devices import bytes_of
from library.options.base import Options
from library.options.leco import list_ignored_by_leco
from library.options.machine.memory import MemoryOptions
from library.training.reporting.step_events import peak_of_main_memory
from library.training.run_parts import Run

WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "cannot allocate memory")
# torch's allocator and the system, a thread's stack, the loader of shared libraries, and C code of Python
OF_THE_CPU = ("defaultcpuallocator", "allocate memory", "new thread", "map segment", "exception set", "an exception")
# torch's allocator raises OutOfMemoryError for a GPU's memory. With so much of it free, CUDA lacks main memory to pin.
OF_CUDA, FREE_SHARE = "cuda error: out of memory", 0.1
# Messages of cuDNN without workspace memory, of the allocator where NVML is not available (WSL, MIG;
# pytorch#112377), of the loader of shared libraries, and of Python where a thread gets no stack or C code loses a
# MemoryError. Other faults may contain these words too.
DISGUISED = (
    "unable to find an engine to execute this computation",
    "nvml_success == r internal assert",
    "failed to map segment from shared object",
    "can't start new thread",
    "without exception set",
    "without setting an exception",
)


OTHER_PROGRAMS = "other programs that run on this machine use its memory too"


class OutOfMemoryError(UserError):
    """Memory ran out; the message says where, and what saves memory."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a run."""

    denoiser: int = 0
    text_encoders: int = 0
    vae: int = 0
    num_trained: int = 0  # a number of parameters


def measure_sizes(run: Run) -> Sizes:
    models = run.context.models
    return Sizes(
        bytes_of(models.denoiser),
        sum(bytes_of(encoder) for encoder in models.text_encoders),
        0 if models.vae is None else bytes_of(models.vae),
        sum(p.numel() for p in run.context.network.trainable_parameters()),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out, or probably did: torch's own error on GPUs, RuntimeError on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):  # such as a process that cannot be forked
        return error.errno == errno.ENOMEM
    words = (*WORDS, *DISGUISED) if isinstance(error, RuntimeError) else DISGUISED
    is_of_such_kind = isinstance(error, RuntimeError | ImportError | SystemError)
    return is_of_such_kind and any(text in str(error).lower() for text in words)


def describe_out_of_memory(error: BaseException) -> str:
    """Describe an out-of-memory error outside of `explain_out_of_memory`, such as in the main process' data."""
    is_on_gpu = isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available()
    lines = [
        f"{likely(error)}out of memory",
        f"memory: {memory_figures(torch.device('cuda' if is_on_gpu else 'cpu'))}",
        f"to save memory: {OTHER_PROGRAMS}",
        "to save memory: --max_data_loader_n_workers 0 loads images without further processes",
        first_line(error),
    ]
    return "\n  ".join(lines)


def likely(error: BaseException) -> str:
    """Return "probably " for a message that other faults have too."""
    return "probably " if any(words in str(error).lower() for words in DISGUISED) else ""


def first_line(error: BaseException) -> str:
    return f"the error itself: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


@contextmanager
def explain_out_of_memory(
    doing: str,
    options: Options,
    device: torch.device,
    shape: str,
    sizes: Callable[[], Sizes] = Sizes,
    memory_hints: Callable[[], Sequence[str]] = tuple,
) -> Iterator[None]:
    """Convert an out-of-memory error inside the block to OutOfMemoryError; `shape` describes the batch, or is "".

    `memory_hints` predicts the savings of other configurations; see library.training.planning.advice.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if device.type == "cuda" and lacks_main_memory(error, device):
            raise OutOfMemoryError("\n  ".join(explain_main_memory(doing, options.flat(), error))) from error
        predicted, values = memory_hints(), options.flat()
        ignored = list_ignored_by_leco(type(options)) if "prompts_file" in values else None
        others = find_savings(values, sizes(), device, bool(predicted), ignored)
        lines = [
            f"{likely(error)}out of memory while {doing}{f', {shape}' if shape else ''}",
            f"memory: {memory_figures(device)}",
            *(f"to save memory: {line} (predicted)" for line in predicted),
            *(f"to save memory: {line}" for line in others),
            first_line(error),
        ]
        raise OutOfMemoryError("\n  ".join(lines)) from error


def lacks_main_memory(error: BaseException, device: torch.device) -> bool:
    """Return True if a run on a GPU lacks main memory, or main memory that can be pinned."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, MemoryError | OSError) or any(words in text for words in OF_THE_CPU):
        return True
    free, total = torch.cuda.mem_get_info(device)
    return OF_CUDA in text and free > FREE_SHARE * total


def explain_main_memory(doing: str, values: Mapping[str, Any], error: BaseException) -> Iterator[str]:
    """Yield the lines of the message where a run on a GPU lacks main memory; `values` are those of all options."""
    memory = MemoryOptions(**{name: values[name] for name in MemoryOptions.defaults()})
    yield f"{likely(error)}out of main memory while {doing}"
    yield f"main memory: {memory_figures(torch.device('cpu'))}, {format_bytes(psutil.virtual_memory().available)} free"
    if memory.num_offloaded:
        yield "to save main memory: a smaller --blocks_to_swap keeps fewer blocks there"
    if memory.offloads_inputs:
        yield "to save main memory: without --cpu_offload_checkpointing the inputs of blocks stay on the GPU"
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if values.get(name) and not values.get(f"{name}_to_disk"):
            yield f"to save main memory: --{name}_to_disk keeps them on the disk"
    if values["max_data_loader_n_workers"]:
        yield "to save main memory: --max_data_loader_n_workers 0 loads images in the training process"
    yield f"to save main memory: {OTHER_PROGRAMS}; WSL2 has the share that .wslconfig gives it"
    yield first_line(error)


def memory_figures(device: torch.device) -> str:
    """Describe the peak use and the size of the device's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return (
            f"peak {format_bytes(peak)} in tensors, {format_bytes(reserved)} taken from the GPU, "
            f"{format_bytes(free)} of {format_bytes(total)} free now"
        )
    peak, total = peak_of_main_memory() or 0, psutil.virtual_memory().total
    return f"peak {format_bytes(peak)} of this process, {format_bytes(total)} in the machine"


def find_savings(
    values: Mapping[str, Any],
    sizes: Sizes,
    device: torch.device,
    is_predicted: bool = False,
    ignored: Collection[str] | None = None,
) -> Iterator[str]:
    """Yield options that are unused and save memory, the largest saving first, with bytes where known.

    `is_predicted` excludes block running and weight formats, which the planner covers. `ignored` holds the options
    without effect if prompts are trained without images, else None.
    """
    ignored_flags = tuple(f"--{name} " for name in ignored or ())
    savings = find_all_savings(values, sizes, device, is_predicted)
    yield from (line for line in savings if not line.startswith(ignored_flags))
    if ignored is not None:
        yield "a smaller batch_size in the --prompts_file needs as much less for activations"


def find_all_savings(
    values: Mapping[str, Any], sizes: Sizes, device: torch.device, is_predicted: bool
) -> Iterator[str]:
    yield from activation_savings(values, is_predicted)
    yield from weight_savings(values, sizes, is_predicted)
    if values["vae_batch_size"] > 1:
        yield "--vae_batch_size 1 encodes one image at a time"
    if not sizes.num_trained and can_have(values, "text_encoder_cpu"):  # while models are loaded and captions encoded
        if (values["text_encoder_batch_size"] or 1) > 1:
            yield "--text_encoder_batch_size 1 encodes one caption at a time"
        yield "--text_encoder_cpu encodes captions on the CPU, which is slow"
    is_adamw = (values["optimizer_type"] or "AdamW").lower() == "adamw" and not values["use_8bit_adam"]
    if is_adamw and sizes.num_trained:
        # AdamW keeps two numbers of 4 bytes for each parameter, its 8-bit version two of 1 byte.
        saved = format_bytes(6 * sizes.num_trained)
        yield f"--optimizer_type AdamW8bit keeps the optimizer's memory in 8 bits: {saved} less"
    if sizes.num_trained:
        # Weight, gradient and two numbers of the optimizer, 4 bytes each.
        held = format_bytes(16 * sizes.num_trained)
        yield f"a smaller --network_dim shrinks the adapter, its gradient and its optimizer, about {held} together"
    if device.type == "cpu":
        yield OTHER_PROGRAMS


def activation_savings(values: Mapping[str, Any], is_predicted: bool) -> Iterator[str]:
    if not is_predicted and not values["gradient_checkpointing"]:
        yield (
            "--gradient_checkpointing keeps only the inputs of the blocks, which is most of what a step needs besides "
            "the weights"
        )
    batch_size = values["train_batch_size"]
    if batch_size > 1 and values["dataset_config"] is None:
        yield (
            f"--train_batch_size {batch_size // 2} needs {batch_size // 2 / batch_size:.0%} of the activations; "
            "--gradient_accumulation_steps makes up for it"
        )
    elif values["dataset_config"] is not None:
        yield "a smaller batch_size in the --dataset_config needs as much less for activations"
    yield "a smaller resolution needs less by the square of its side"


def weight_savings(values: Mapping[str, Any], sizes: Sizes, is_predicted: bool) -> Iterator[str]:
    """Yield options that reduce or offload the frozen models."""
    frozen = sizes.denoiser + sizes.text_encoders + sizes.vae
    if values["mixed_precision"] == "no":
        yield f"--mixed_precision bf16 halves models and activations{less(frozen // 2)}"
    if not values["cache_latents"]:
        yield f"--cache_latents lets the VAE leave before training{less(sizes.vae)}"
    if can_have(values, "cache_text_encoder_outputs"):
        yield f"--cache_text_encoder_outputs lets the text encoders leave before training{less(sizes.text_encoders)}"
    elif not values["network_train_unet_only"]:
        yield "--network_train_unet_only needs no activations of the text encoder"
    if is_predicted:
        return
    if not values["base_format"] and not values["fp8_base"]:
        yield f"--base_format int8 keeps the denoiser in 8 bits{less(sizes.denoiser // 2)}"
    if can_have(values, "blocks_to_swap"):
        whole = format_bytes(sizes.denoiser)
        yield f"--blocks_to_swap N keeps N blocks of the denoiser in main memory, which has {whole} in all"


def can_have(values: Mapping[str, Any], name: str) -> bool:
    """Return True if this base model has an option and it is unused."""
    return name in values and not values[name]


def less(num_bytes: int) -> str:
    return f": {format_bytes(num_bytes)} less" if num_bytes else ""
