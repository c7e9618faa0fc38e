"""The options that only Anima has."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import Options, group, option, redeclared
from library.options.caching import TextCachingOptions
from library.options.machine.memory import ATTENTION_MODES
from library.options.model import ReadingOptions
from library.options.train import TrainOptions
from library.options.training.flow import FlowSamplingOptions, FlowWeightingOptions, TimestepPreviewOptions

REG_LRS_INSTEAD = "it is for training the model itself; give adapters rates with --network_args network_reg_lrs"
FINE_TUNING_ONLY = "Has no effect: it is for training the model itself; adapters take network_reg_lrs."


@dataclass(frozen=True)
class AnimaTextOptions(Options):
    """The text encoder and what reaches the denoiser of a caption."""

    qwen3: str | None = option(None, usual=True, help="File or folder of the text encoder Qwen3 0.6B.")
    llm_adapter_path: str | None = option(
        None, help="File with a text adapter (llm_adapter) that stands in for the one of the base model."
    )
    t5_tokenizer_path: str | None = option(
        None, help="Folder of T5's tokenizer. Unset looks beside the base model, then on the hub."
    )
    qwen3_max_token_length: int = option(
        512, at_least=1, help="Longest caption in Qwen3's tokens; what is longer is cut."
    )
    t5_max_token_length: int = option(512, at_least=2, help="Longest caption in T5's tokens; what is longer is cut.")


@dataclass(frozen=True)
class AnimaRateOptions(Options):
    """Learning rates of parts of the model, which only full training has."""

    llm_adapter_lr: float | None = option(
        None, ignored=REG_LRS_INSTEAD, help=f"{FINE_TUNING_ONLY} Here: of the text adapter."
    )
    self_attn_lr: float | None = option(
        None, ignored=REG_LRS_INSTEAD, help=f"{FINE_TUNING_ONLY} Here: of attention to the picture."
    )
    cross_attn_lr: float | None = option(
        None, ignored=REG_LRS_INSTEAD, help=f"{FINE_TUNING_ONLY} Here: of attention to the text."
    )
    mlp_lr: float | None = option(None, ignored=REG_LRS_INSTEAD, help=f"{FINE_TUNING_ONLY} Here: of the MLPs.")
    mod_lr: float | None = option(None, ignored=REG_LRS_INSTEAD, help=f"{FINE_TUNING_ONLY} Here: of the modulation.")


@dataclass(frozen=True)
class AnimaMemoryOptions(Options):
    """How the models compute."""

    attn_mode: str | None = option(
        None,
        help="Which attention the denoiser computes with. It is always PyTorch's own, torch and sdpa name it; the "
        "others are warned of.",
        choices=ATTENTION_MODES,
    )
    split_attn: bool = option(
        False,
        ignored="torch's attention needs no more memory for several pictures",
        help="Attend to one picture at a time. Has no effect: PyTorch's attention needs no more memory for many.",
    )
    vae_chunk_size: int | None = option(
        None,
        at_least=0,
        ignored="the VAE takes pictures whole",
        help="Pixels that the VAE takes at a time. Has no effect: it takes pictures whole.",
    )
    qwen_image_vae_2d: bool = option(
        False,
        own=True,
        help="Compute the VAE's convolutions over time in two dimensions, which is all that a picture needs, in less "
        "time and memory. Latents are the same to rounding, and caches serve both ways.",
    )
    vae_disable_cache: bool = option(
        False,
        ignored="a picture has one frame, of which the VAE keeps nothing",
        help="Let the VAE keep nothing of earlier frames. Has no effect: a picture has one frame.",
    )


@dataclass(frozen=True)
class AnimaSamplingOptions(FlowSamplingOptions):
    """How noise levels are drawn."""

    timestep_sampling: str = redeclared(FlowSamplingOptions, "timestep_sampling", "sigmoid")
    discrete_flow_shift: float = redeclared(FlowSamplingOptions, "discrete_flow_shift", 1.0)


INSTEAD: Mapping[str, str] = {
    "dit": "here it is --pretrained_model_name_or_path",
    "dit_path": "here it is --pretrained_model_name_or_path",
    "timestep_sample_method": "here it is --timestep_sampling",
    "training_shift": "here it is --discrete_flow_shift with --timestep_sampling shift",
    "guidance_scale": "the model is trained without guidance; --l in the line of a prompt guides its preview",
    "model_prediction_type": "the model is trained in one way, as with raw",
    "ae": "here it is --vae",
    "t5xxl_max_token_length": "here it is --t5_max_token_length",
    "t5xxl": "here it is --qwen3",
    "clip_l": "here it is --qwen3",
    "gemma2": "here it is --qwen3",
    "text_encoder": "here it is --qwen3",
    "gemma2_max_token_length": "here it is --qwen3_max_token_length",
    "split_mode": "here it is --blocks_to_swap",
}
"""What options of other scripts and programs are here, as the error for one of them ends."""


@dataclass(frozen=True)
class AnimaOptions(TrainOptions):
    """All options of anima_train_network.py."""

    text: AnimaTextOptions = group(AnimaTextOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    rates: AnimaRateOptions = group(AnimaRateOptions)
    flow_sampling: AnimaSamplingOptions = group(AnimaSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    computing: AnimaMemoryOptions = group(AnimaMemoryOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)
