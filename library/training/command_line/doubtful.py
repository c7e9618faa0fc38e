"""Valid settings that are probably mistakes."""

import math
import os
from collections.abc import Iterator

import torch

from library.environment.installed import architecture_of
from library.options.machine.memory import PrecisionOptions
from library.options.model import ModelOptions
from library.options.network_args import is_switched_on
from library.options.no_effect import is_set
from library.options.output.saving import MetadataOptions
from library.options.training.network import NetworkOptions
from library.options.training.noise import NoiseOptions
from library.options.training.optimizer import OptimizerOptions
from library.training.optimization.optimizers import resolve_optimizer_type

ADAPTIVE = ("adam", "lion")  # their step size equals the learning rate, whatever the gradient
AOTRITON = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
HIGH_RATE = 5e-3  # ten times the value that front ends and guides use for small adapters
SETS_OWN_RATE = ("prodigy", "dadapt", "adafactor")  # have their own warnings about unusual rates
WEAK = 1 / 16  # alpha / rank from which on a usual learning rate teaches next to nothing
WITHOUT_ALPHA = ("oft", "boft", "ia3", "full", "lokr", "diag-oft", "glora", "norm")  # alpha means little or nothing


def find_doubtful_schedule(noise: NoiseOptions, model: ModelOptions) -> Iterator[str]:
    """Yield a line if the noise schedule does not suit what the model predicts."""
    if noise.zero_terminal_snr and not model.v_parameterization:
        yield (
            "--zero_terminal_snr leaves no signal at the last timestep, where a model that predicts noise learns "
            "nothing; it is meant for --v_parameterization"
        )


def find_doubtful_precision(precision: PrecisionOptions) -> Iterator[str]:
    """Yield a line if the launcher has another precision, and if this GPU lacks units for the precision."""
    # accelerate launch passes its own option on in this variable.
    launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision.mixed_precision == "no" and launcher_precision != "no":
        yield (
            f"accelerate launch has --mixed_precision {launcher_precision}, which has no effect: the script's own "
            f"option counts, and that is no; give --mixed_precision {launcher_precision} to the script"
        )
    if precision.mixed_precision == "bf16" and (gpu := gpu_without_bf16()) is not None:
        yield (
            f"--mixed_precision bf16: {gpu} has no units for bf16, so products are emulated and attention takes far "
            "more memory; --mixed_precision fp16 is faster there"
        )
    if (gpu := gpu_with_experimental_attention()) is not None and os.environ.get(AOTRITON) != "1":
        yield (
            f"{gpu}: torch counts fused attention on this GPU as experimental and may use the math form, which keeps "
            f"all scores: its memory grows with the square of the image's pixels. Set {AOTRITON}=1 before the run"
        )


def find_lost_metadata(metadata: MetadataOptions, file_type: str) -> Iterator[str]:
    """Yield a line for every given option whose text a file of this type cannot hold."""
    values, defaults = metadata.flat(), MetadataOptions.defaults()
    for name in values if file_type in ("ckpt", "pt") else ():
        if name != "no_metadata" and is_set(values[name], defaults[name]):
            yield f"--{name} has no effect: files of --save_model_as {file_type} hold no metadata"


def find_doubtful_rates(network: NetworkOptions, optimizer: OptimizerOptions) -> Iterator[str]:
    """Yield a line where the denoiser's adapter trains with the default rate, which is meant for whole models, and for
    every rate at which Adam and its relatives destroy an adapter."""
    name, rate = resolve_optimizer_type(optimizer), optimizer.learning_rate
    if name.lower().startswith(SETS_OWN_RATE):
        return
    is_named = network.unet_lr is not None or network.network_train_text_encoder_only
    if not is_named and rate == OptimizerOptions.learning_rate:
        # Lion's authors recommend rates 3 to 10 times lower than Adam's (Chen et al. 2023).
        usual = "3e-5" if "lion" in name.lower() else "1e-4"
        yield (
            f"--learning_rate is {rate:g}, the default for training whole models and far too low for an adapter; "
            f"{usual} is usual with {name}"
        )
    rates = {"unet_lr": network.unet_lr, "text_encoder_lr": max(network.text_encoder_lr or (), default=None)}
    if network.unet_lr is None:
        rates["learning_rate"] = rate
    for flag, value in rates.items() if any(part in name.lower() for part in ADAPTIVE) else ():
        if value is not None and value >= HIGH_RATE:
            yield (
                f"--{flag} is {value:g}, at which {name} usually destroys an adapter within a few steps; 1e-4 is "
                "usual, 1e-3 is high"
            )


def find_weak_alpha(network: NetworkOptions, optimizer: OptimizerOptions) -> Iterator[str]:
    """Yield a line if alpha, which is 1 unless set, is so far below the rank that the adapter hardly learns."""
    rank, alpha = network.network_dim, network.network_alpha
    algorithms = [item.partition("=")[2] for item in network.network_args or () if item.startswith("algo=")]
    kind = [(network.network_module or "").rpartition(".")[2], *algorithms][-1]
    if rank is None or alpha == 0 or network.dim_from_weights or kind.lower().startswith(WITHOUT_ALPHA):
        return
    if resolve_optimizer_type(optimizer).lower().startswith(SETS_OWN_RATE):  # they make up for it
        return
    divisor = math.sqrt(rank) if is_switched_on(network.network_args, "rslora") else rank
    if alpha / divisor <= WEAK:
        unset = " (its default)" if alpha == NetworkOptions.network_alpha else ""
        yield (
            f"--network_alpha is {alpha:g}{unset}, so the adapter of --network_dim {rank} acts at "
            f"1/{divisor / alpha:.3g} of its strength and may seem to do nothing; use --network_alpha {rank // 2} or "
            f"{rank}"
        )


def gpu_with_experimental_attention() -> str | None:
    """Return the name of an AMD GPU without matrix cores of the CDNA generations (gfx9), for which ROCm's fused
    attention is made; else None."""
    if not torch.cuda.is_available() or not torch.version.hip or architecture_of(torch, 0).startswith("gfx9"):
        return None
    return torch.cuda.get_device_name()


def gpu_without_bf16() -> str | None:
    """Return the name of a CUDA GPU older than Ampere, the first generation with bf16 tensor cores; else None."""
    # ROCm numbers its GPUs by another scheme, so the comparison would say nothing there.
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() >= (8, 0):
        return None
    return torch.cuda.get_device_name()
