"""The options specific to FLUX.1 and Chroma."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options.base import group, option, without_effect
from library.options.flow_model import FLOW_INSTEAD, FlowTrainOptions, PartsOptions
from library.options.kinds import whole
from library.options.model import BASE, TRAINING_ADAPTER, ModelFile, edit, part
from library.options.training.flow import FlowPredictionOptions

SPLIT_MODE_BLOCKS = 18  # offloaded blocks with `split_mode`


@dataclass(frozen=True)
class FluxModelOptions(PartsOptions):
    """The parts of the base model and the text limits."""

    clip_l: str | None = option(None, path="part", needs="model_type=flux", usual=True)
    """File or folder of the text encoder CLIP-L. Unset takes it from the base. Chroma has none."""
    t5xxl: str | None = part("the text encoder T5-XXL")
    ae: str | None = part("the VAE")
    controlnet_model_name_or_path: str | None = without_effect(
        None, "training adapters with a ControlNet is not supported"
    )
    t5xxl_max_token_length: int | None = option(None, kind=whole(2))
    """Longest caption in T5's tokens; longer captions are cut. Unset is 256 for schnell and 512 otherwise."""
    apply_t5_attn_mask: bool = option(False)
    """Keep T5 and the denoiser from attending to caption padding. Always on for Chroma."""
    guidance_scale: float = option(3.5, usual=True, follows=("guidance_loss", "model_type=flux"))
    """Guidance strength given to the denoiser in training; schnell has no such input. Most FLUX.1 recipes train with 1;
    Chroma was trained with 0."""
    model_type: str = option("flux", choices=("flux", "chroma"))
    """The base model: flux for FLUX.1 dev and schnell."""
    edit: bool = edit()
    split_mode: bool = option(False, unless="blocks_to_swap", affects_training=False)
    """An old name for --blocks_to_swap 18."""


FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors", 23.8, "FLUX.1 dev non-commercial"),
    ModelFile(BASE, "lodestones/Chroma1-HD", "Chroma1-HD.safetensors", 17.8, "Apache-2.0"),
    ModelFile("clip_l", "comfyanonymous/flux_text_encoders", "clip_l.safetensors", 0.25, "Apache-2.0"),
    ModelFile("t5xxl", "comfyanonymous/flux_text_encoders", "t5xxl_fp16.safetensors", 9.8, "Apache-2.0"),
    ModelFile("ae", "Comfy-Org/z_image_turbo", "ae.safetensors", 0.34, "Apache-2.0"),
    ModelFile(TRAINING_ADAPTER, "ostris/FLUX.1-schnell-training-adapter", "", release="schnell"),
)

PARTS = "--clip_l clip_l.safetensors --t5xxl t5xxl.safetensors --ae ae.safetensors"

INSTEAD: Mapping[str, str] = {
    "dit": "use --pretrained_model_name_or_path",
    **FLOW_INSTEAD,
    "clip_g": "the model has only CLIP-L and T5",
    "apply_lg_attn_mask": "only CLIP-L's pooled vector is used, which needs no mask",
    "t5_max_token_length": "use --t5xxl_max_token_length",
    "text_encoder": "use --clip_l and --t5xxl",
    **dict.fromkeys(("qwen3", "gemma2"), "use --t5xxl"),
    "sample_batch_size": "previews are drawn one by one",
}


@dataclass(frozen=True)
class FluxOptions(FlowTrainOptions):
    """All options of flux_train_network.py."""

    parts: FluxModelOptions = group(FluxModelOptions)
    # sd-scripts' default, although the loss then compares an estimate of the latent with a velocity: a run only warns.
    flow_prediction: FlowPredictionOptions = group(FlowPredictionOptions, model_prediction_type="sigma_scaled")

    def implied(self) -> Mapping[str, Any]:
        """Resolve `split_mode`."""
        if not self.parts.split_mode or self.memory.blocks_to_swap is not None:
            return {}
        return {"blocks_to_swap": SPLIT_MODE_BLOCKS, "split_mode": False}
