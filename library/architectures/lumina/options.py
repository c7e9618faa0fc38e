"""The options specific to Lumina Image 2.0."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import group, option, redeclare, without_effect
from library.options.flow_model import (
    FLOW_INSTEAD,
    NO_SAGE_ATTENTION,
    SD_SCRIPTS_INSTEAD,
    FlowTrainOptions,
    PartsOptions,
)
from library.options.kinds import whole
from library.options.model import BASE, ModelFile, part
from library.options.training.flow import TIMESTEP_SAMPLINGS, FlowSamplingOptions


@dataclass(frozen=True)
class LuminaModelOptions(PartsOptions):
    """The parts of the base model and the text limits."""

    gemma2: str | None = part("the text encoder Gemma 2")
    ae: str | None = part("the VAE")
    gemma2_max_token_length: int | None = option(None, kind=whole(2))
    """Longest caption in Gemma's tokens; longer captions are cut. Unset is 256."""
    system_prompt: str = option("")
    """Instruction before every caption and preview prompt, followed by the marker that the model was trained with.
    Empty captions and negative prompts get none."""
    use_flash_attn: bool = without_effect(
        False,
        "attention is torch's scaled dot product, which includes flash attention",
        "Has no effect: attention is PyTorch's scaled dot product, which has its own flash attention.",
    )
    use_sage_attn: bool = without_effect(False, *NO_SAGE_ATTENTION)
    sample_batch_size: int | None = without_effect(
        None,
        "preview images are generated one by one",
        "Has no effect: preview images are generated one by one, so that none depends on another.",
    )


@dataclass(frozen=True)
class LuminaSamplingOptions(FlowSamplingOptions):
    """Sampling of noise levels."""

    timestep_sampling: str = redeclare(
        FlowSamplingOptions,
        "timestep_sampling",
        "shift",
        choices=(*TIMESTEP_SAMPLINGS[:4], "nextdit_shift", *TIMESTEP_SAMPLINGS[4:]),
        help="Sampling of noise levels: sigma from a table by --weighting_scheme, uniform, sigmoid of a normal value, "
        "shift as sigmoid with --discrete_flow_shift, flux_shift (or flux2_shift), qwen_shift and krea2_shift with a "
        "shift that grows with the image size, nextdit_shift as flux_shift of uniform values, logsnr with a normal "
        "log-SNR, qinglong_flux and qinglong_qwen as a mixture.",
    )
    discrete_flow_shift: float = redeclare(FlowSamplingOptions, "discrete_flow_shift", 6.0)


FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "Comfy-Org/Lumina_Image_2.0_Repackaged", "lumina_2_model_bf16.safetensors", 5.2, "Apache-2.0"),
    ModelFile("gemma2", "Comfy-Org/Lumina_Image_2.0_Repackaged", "gemma_2_2b_fp16.safetensors", 5.2, "Gemma"),
    ModelFile("ae", "Comfy-Org/z_image_turbo", "ae.safetensors", 0.34, "Apache-2.0"),
)

PARTS = "--gemma2 gemma2.safetensors --ae ae.safetensors"

INSTEAD: Mapping[str, str] = {
    **FLOW_INSTEAD,
    **SD_SCRIPTS_INSTEAD,
    **dict.fromkeys([f"{name}_max_token_length" for name in ("t5xxl", "t5", "qwen3")], "use --gemma2_max_token_length"),
    **dict.fromkeys(("t5xxl", "clip_l", "qwen3", "text_encoder"), "use --gemma2"),
}


@dataclass(frozen=True)
class LuminaOptions(FlowTrainOptions):
    """All options of lumina_train_network.py."""

    parts: LuminaModelOptions = group(LuminaModelOptions)
    flow_sampling: LuminaSamplingOptions = group(LuminaSamplingOptions)
