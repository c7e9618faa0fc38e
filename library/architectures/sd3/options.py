"""The options specific to Stable Diffusion 3."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import Options, group, option, without_effect
from library.options.caching import TextCachingOptions
from library.options.flow_model import SD_SCRIPTS_INSTEAD
from library.options.kinds import SHARE, number, whole
from library.options.model import BASE, ModelFile, ReadingOptions, part
from library.options.train import TrainOptions
from library.options.training.flow import FlowWeightingOptions, TimestepPreviewOptions


@dataclass(frozen=True)
class Sd3TextOptions(Options):
    """The text encoders and their use by the denoiser."""

    clip_l: str | None = part("the text encoder CLIP-L")
    clip_g: str | None = part("the text encoder CLIP-G")
    t5xxl: str | None = option(None, path="part", usual=True)
    """File or folder of the text encoder T5-XXL. Unset takes it from the base model, and trains without T5 if that has
    none."""
    save_clip: bool = without_effect(
        False, "adapter files contain no text encoders", "Has no effect: adapter files hold no text encoders."
    )
    save_t5xxl: bool = without_effect(
        False,
        "adapter files contain no text encoders",
        "Has no effect: adapter files contain only the adapters of T5-XXL.",
    )
    t5xxl_device: str | None = without_effect(None, "T5-XXL runs on the same device as everything else")
    t5xxl_dtype: str | None = without_effect(None, "T5-XXL runs in the precision of --mixed_precision")
    t5xxl_max_token_length: int = option(256, kind=whole(2))
    """Longest caption in T5's tokens; longer captions are cut."""
    apply_lg_attn_mask: bool = option(False)
    """Keep both CLIP encoders from attending to caption padding."""
    apply_t5_attn_mask: bool = option(False)
    """Keep T5 from attending to caption padding."""
    clip_l_dropout_rate: float = option(0.0, kind=SHARE, needs_images=True)
    """Share of samples trained with zeros instead of CLIP-L's features, 0 to 1."""
    clip_g_dropout_rate: float = option(0.0, kind=SHARE, needs_images=True)
    """Share of samples trained with zeros instead of CLIP-G's features, 0 to 1."""
    t5_dropout_rate: float = option(0.0, kind=SHARE, needs_images=True)
    """Share of samples trained with zeros instead of T5's features, 0 to 1."""


@dataclass(frozen=True)
class Sd3TrainingOptions(Options):
    """Positions and noise levels."""

    pos_emb_random_crop_rate: float = option(0.0, kind=SHARE, needs_images=True)
    """Share of batches whose images are placed at random in the table of positions instead of its centre, 0 to 1. For
    SD3.5 medium."""
    enable_scaled_pos_embed: bool = option(
        False, refused_by_leco="there is no data set whose resolutions it could follow; leave it out"
    )
    """Scale the table of positions to each resolution of the data set, for SD3.5 medium."""
    training_shift: float = option(1.0, usual=True, kind=number(above=0), needs_images=True)
    """Shift of the drawn noise levels toward pure noise: 1 leaves them unchanged, SD3 generates images with 3."""


FILES: tuple[ModelFile, ...] = (
    ModelFile(
        BASE, "stabilityai/stable-diffusion-3.5-medium", "sd3.5_medium.safetensors", 5.1, "Stability AI Community"
    ),
    ModelFile(
        BASE, "stabilityai/stable-diffusion-3.5-large", "sd3.5_large.safetensors", 16.5, "Stability AI Community"
    ),
    ModelFile(BASE, "stabilityai/stable-diffusion-3-medium", "sd3_medium.safetensors", 4.3, "Stability AI Community"),
    ModelFile("clip_l", "stabilityai/stable-diffusion-3.5-medium", "clip_l.safetensors", 0.25),
    ModelFile("clip_g", "stabilityai/stable-diffusion-3.5-medium", "clip_g.safetensors", 1.4),
    ModelFile("t5xxl", "stabilityai/stable-diffusion-3.5-medium", "t5xxl_fp16.safetensors", 9.8, is_optional=True),
)

PARTS = "--clip_l clip_l.safetensors --clip_g clip_g.safetensors --t5xxl t5xxl.safetensors"

INSTEAD: Mapping[str, str] = {
    **SD_SCRIPTS_INSTEAD,
    "discrete_flow_shift": "use --training_shift",
    "timestep_sampling": "use --weighting_scheme",
    "sigmoid_scale": "use --logit_std with --weighting_scheme logit_normal",
    "model_prediction_type": "the model has only one prediction type, equal to raw",
    "ae": "use --vae",
    "t5_max_token_length": "use --t5xxl_max_token_length",
    **dict.fromkeys(("text_encoder", "qwen3", "gemma2"), "use --clip_l, --clip_g and --t5xxl"),
}


@dataclass(frozen=True)
class Sd3Options(TrainOptions):
    """All options of sd3_train_network.py."""

    text: Sd3TextOptions = group(Sd3TextOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    sd3: Sd3TrainingOptions = group(Sd3TrainingOptions)
    flow: FlowWeightingOptions = group(FlowWeightingOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)
