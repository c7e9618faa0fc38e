"""musubi-tuner's option names, for the base models that it also trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options.base import Options, group, option, redeclare, without_effect
from library.options.flow_model import FLOW_INSTEAD, NO_SAGE_ATTENTION, ONE_CALL_OF_ATTENTION, FlowOptions, PartsOptions
from library.options.machine.compiling import COMPILERS, CompileOptions
from library.options.machine.memory import ScaledPrecisionOptions
from library.options.model import ModelOptions, part
from library.options.train import TrainOptions
from library.options.training.network import train_denoiser_alone

OWN_ATTENTION = "attention is torch's scaled dot product, which has flash attention of its own"
IN_MIXED_PRECISION = "attention is computed in the format of --mixed_precision; --mixed_precision no is 32 bits"
EMBEDDERS_STAY = "the embedders stay on the GPU; --blocks_to_swap offloads blocks"
NEVER_MAPPED = "tensors are read from files piece by piece, and NumPy maps none"
NO_GUIDANCE_INPUT = "training takes no guidance scale; previews take theirs from the prompt (--l, --g)"
TILED_IF_NEEDED = "the VAE works in tiles by itself where memory runs out"
VAE_DTYPE = "the VAE runs in the format of --mixed_precision, or in 32 bits with --no_half_vae"
TEXT_ENCODER_DTYPE = "text encoders run in the format of --mixed_precision"
FORMATS: Mapping[str, str] = {  # of musubi-tuner's options that name a dtype, by value of --mixed_precision
    "float32": "no", "fp32": "no", "float": "no", "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16",
    "half": "fp16",
}  # fmt: skip


@dataclass(frozen=True)
class DitOptions(Options):
    """The base model and attention in musubi-tuner's words."""

    dit: str | None = option(None, path="model", logged=False)
    """The base model, as --pretrained_model_name_or_path, in musubi-tuner's words. As there, latents and text features
    are then cached in files."""
    flash_attn: bool = without_effect(False, OWN_ATTENTION)
    sage_attn: bool = without_effect(False, *NO_SAGE_ATTENTION)
    split_attn: bool = without_effect(False, ONE_CALL_OF_ATTENTION)
    flash3: bool = without_effect(False, OWN_ATTENTION, f"Has no effect, like --flash_attn: {OWN_ATTENTION}.")
    use_32bit_attention: bool = without_effect(False, IN_MIXED_PRECISION)
    gradient_checkpointing_cpu_offload: bool = option(False, affects_training=False)
    """musubi-tuner's name of --cpu_offload_checkpointing."""
    img_in_txt_in_offloading: bool = without_effect(False, EMBEDDERS_STAY)
    disable_numpy_memmap: bool = without_effect(False, NEVER_MAPPED)
    vae_tiling: bool = without_effect(False, TILED_IF_NEEDED)
    vae_dtype: str | None = option(
        None,
        ignored=VAE_DTYPE,
        choices=tuple(FORMATS),
        help=f"Number format of the VAE. float32 is --no_half_vae; others have no effect: {VAE_DTYPE}.",
    )
    text_encoder_dtype: str | None = option(
        None,
        ignored=TEXT_ENCODER_DTYPE,
        choices=tuple(FORMATS),
        help=f"Number format of the text encoders. Has no effect: {TEXT_ENCODER_DTYPE}.",
    )
    dynamo_mode: str | None = option(None, choices=("default", "reduce-overhead", "max-autotune"))
    """Old name of --compile_mode."""
    dynamo_fullgraph: bool = option(False)
    """Old name of --compile_fullgraph."""
    dynamo_dynamic: bool = option(False)
    """Old name of --compile_dynamic true."""
    guidance_scale: float | None = without_effect(None, NO_GUIDANCE_INPUT)


DYNAMO_BACKENDS = (  # accelerate's names
    "NO", "EAGER", "AOT_EAGER", "INDUCTOR", "AOT_TS_NVFUSER", "NVPRIMS_NVFUSER", "CUDAGRAPHS", "OFI", "FX2TRT",
    "ONNXRT", "TENSORRT", "AOT_TORCHXLA_TRACE_ONCE", "TORCHXLA_TRACE_ONCE", "IPEX", "TVM", "HPU",
)  # fmt: skip


@dataclass(frozen=True)
class DitCompileOptions(CompileOptions):
    """Compiling the blocks of the denoiser."""

    dynamo_backend: str = redeclare(
        CompileOptions,
        "dynamo_backend",
        "inductor",
        choices=(*COMPILERS, *DYNAMO_BACKENDS),
        help="Compiler that --torch_compile uses. musubi-tuner's names in upper case compile by themselves, except NO.",
    )


ALTERNATIVES: Mapping[str, str] = {
    **FLOW_INSTEAD,
    "split_mode": "use --blocks_to_swap",
    "ae": "use --vae",
    **dict.fromkeys(("t5xxl", "clip_l", "qwen3", "gemma2", "byt5"), "use --text_encoder"),
}
"""Replacements for options of other scripts and programs, appended to the error for such an option."""


@dataclass(frozen=True)
class PartOptions(PartsOptions):
    """The parts of the base model."""

    text_encoder: str | None = part("the text encoder")


@dataclass(frozen=True)
class MusubiOptions(TrainOptions):
    """The options of musubi-tuner that other base models do not have."""

    precision: ScaledPrecisionOptions = group(ScaledPrecisionOptions)
    compiling: DitCompileOptions = group(DitCompileOptions)
    dit: DitOptions = group(DitOptions)


@dataclass(frozen=True)
class DitTrainOptions(FlowOptions, MusubiOptions):
    """The options of a base model that musubi-tuner also trains."""

    parts: PartOptions = group(PartOptions)

    def implied(self) -> Mapping[str, Any]:
        """Return what musubi-tuner's options stand for. Train only the denoiser, because the text encoders of these
        models do not support adapters."""
        words = translate_words(self.dit, self.precision.mixed_precision, self.compiling.dynamo_backend)
        return {**words, **train_denoiser_alone(self.network), **apply_dit(self.dit.dit, self.model)}


def translate_words(words: DitOptions, mixed_precision: str, backend: str) -> Mapping[str, object]:
    """Return the values of the options that musubi-tuner's options stand for, and unset those that are obeyed."""
    values: dict[str, object] = {}
    if words.gradient_checkpointing_cpu_offload:
        values |= {"cpu_offload_checkpointing": True, "gradient_checkpointing_cpu_offload": False}
    if words.vae_dtype is not None and FORMATS[words.vae_dtype] == "no":
        values |= {"no_half_vae": True, "vae_dtype": None}
    # musubi-tuner's names of the backends are upper-case, and select compiling by themselves.
    if backend.isupper():
        default = CompileOptions.defaults()["dynamo_backend"]
        values |= {"dynamo_backend": default}
        values |= {} if backend == "NO" else {"compile": True, "compile_backend": backend.lower()}
    if words.dynamo_mode is not None:
        values |= {"compile_mode": words.dynamo_mode, "dynamo_mode": None}
    if words.dynamo_fullgraph:
        values |= {"compile_fullgraph": True, "dynamo_fullgraph": False}
    if words.dynamo_dynamic:
        values |= {"compile_dynamic": "true", "dynamo_dynamic": False}
    values |= {
        name: None
        for name in ("vae_dtype", "text_encoder_dtype")
        if FORMATS.get(getattr(words, name) or "") == mixed_precision
    }
    return values


def apply_dit(dit: str | None, model: ModelOptions) -> Mapping[str, object]:
    """Return the values that --dit stands for: the base model, and caches on disk."""
    if dit is None:
        return {}
    caches = ("cache_latents", "cache_text_encoder_outputs")
    to_disk = {f"{name}{ending}": True for name in caches for ending in ("", "_to_disk")}
    return {"pretrained_model_name_or_path": model.pretrained_model_name_or_path or dit, **to_disk}
