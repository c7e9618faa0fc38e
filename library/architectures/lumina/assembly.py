"""Lumina Image 2.0: a transformer of one stream, Gemma 2 as text encoder, 16-channel latents.

The assembly, and the table of contents of this package.
"""

import logging
from dataclasses import replace
from pathlib import Path

from library.architectures.interface import Architecture, LiveText, Preview, PromptDefaults, TextCacheSpec
from library.architectures.lumina.gemma import load_gemma_tokenizer
from library.architectures.lumina.load import LuminaLoader, open_loader
from library.architectures.lumina.options import LuminaOptions
from library.architectures.lumina.predict import predict, preview_sampler
from library.architectures.lumina.text import LuminaText
from library.architectures.lumina.view import view
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import FlowMatching, build_sampled_flow
from library.models.vae16 import mapped_latents

logger = logging.getLogger(__name__)

GEMMA_TOKENS = 256
FOREIGN = {  # option -> why it does nothing here
    "v_parameterization": "Lumina Image 2.0 predicts the velocity of a flow",
    "clip_skip": "Lumina Image 2.0 reads Gemma's states before its last layer",
    "max_token_length": "use --gemma2_max_token_length",
    "vae": "use --ae",
    "xformers": "attention is torch's scaled dot product",
    "mem_eff_attn": "attention is torch's scaled dot product, which needs as little memory",
    "use_flash_attn": "attention is torch's scaled dot product, which has flash attention of its own",
    "use_sage_attn": "SageAttention cannot train; attention is torch's scaled dot product",
    "sample_batch_size": "preview pictures are drawn one by one",
}

TOLD = (  # options that files tell as ss_*
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "timestep_sampling", "sigmoid_scale",
    "model_prediction_type", "discrete_flow_shift",
)  # fmt: skip


def build(options: LuminaOptions) -> Architecture:
    """The parts of the model that the options name; none is loaded yet.

    Raises ValueError naming the flag for a file or a setting that does not fit Lumina Image 2.0.
    """
    refuse_settings(options)
    loader = open_loader(options)
    text = build_text(options, loader)
    return Architecture(
        name="lumina",
        load=loader,
        text=text,
        codec=mapped_latents("_lumina.npz"),
        objective=build_objective(options),
        predict=predict,
        view=view,
        preview=build_preview(text),
        metadata=metadata(options),
        text_cache=build_text_cache(options, loader, text),
    )


def refuse_settings(options: LuminaOptions) -> None:
    """Raise ValueError for settings of other models; warn of those that only do nothing."""
    if options.model.weighted_captions:
        raise ValueError("--weighted_captions does not work with Lumina: Gemma knows no weighted words; leave it out")
    values = options.flat()
    for name, why in FOREIGN.items():
        if values[name]:
            logger.warning("--%s has no effect: %s", name, why)


def build_objective(options: LuminaOptions) -> FlowMatching:
    return build_sampled_flow(
        options,
        options.flow_sampling,
        options.flow_weighting,
        prediction_type=options.flow_prediction.model_prediction_type,
        target_kind="latent - noise",
    )


def build_text(options: LuminaOptions, loader: LuminaLoader) -> LuminaText:
    """The tokenizer, looked for beside the base model and beside the encoder."""
    length = options.lumina.gemma2_max_token_length
    if length is not None and length < 2:
        raise ValueError(f"--gemma2_max_token_length is {length}; use 2 or more, {GEMMA_TOKENS} is usual")
    named = [loader.path] + ([Path(options.lumina.gemma2).expanduser()] if options.lumina.gemma2 else [])
    beside = [path if path.is_dir() else path.parent for path in named]
    folders = [folder / "tokenizer" for folder in beside] + beside[1:]
    text = LuminaText(
        load_gemma_tokenizer(folders, options.model.tokenizer_cache_dir, loader.num_words),
        num_tokens=length or GEMMA_TOKENS,
        system_prompt=options.lumina.system_prompt,
    )
    num_instruction = text.count_tokens(" ") if text.system_prompt else 0
    if num_instruction >= text.max_tokens:
        raise ValueError(
            f"--system_prompt has {num_instruction} tokens, which leaves no room for a caption in the "
            f"{text.num_tokens} of --gemma2_max_token_length; shorten one or raise the other"
        )
    return text


def build_text_cache(options: LuminaOptions, loader: LuminaLoader, text: LuminaText) -> TextCacheSpec:
    def identity() -> str:
        settings = (loader.dtype, text.num_tokens, text.system_prompt)
        return f"{fingerprint(loader.gemma.weights)} {' '.join(map(str, settings))}"

    keys = ("hidden_state", "attention_mask", "input_ids")
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_lumina_te.npz",
        keys=keys,
        identity=identity,
        live=LiveText(loader.text_encoders, keys, text.encode),
    )


def build_preview(text: LuminaText) -> Preview:
    """Pictures as sd-scripts draws them: guidance in the first quarter of the steps, no longer than without it."""
    return Preview(
        defaults=PromptDefaults(
            num_steps=36,
            width=1024,
            height=1024,
            scale=3.5,
            size_step=16,
            cfg_trunc_ratio=0.25,
            renorm_cfg=1.0,
            flow_shift=6.0,
        ),
        text=replace(text, system_prompt=""),
        predict=lambda prompt: predict,
        sampler=preview_sampler,
        worded=text.worded,
    )


def metadata(options: LuminaOptions) -> dict[str, str]:
    """What files trained on this base model say about it."""
    values = options.flat()
    return {
        "ss_v2": "False",
        "ss_base_model_version": "lumina2",
        **{f"ss_{name}": str(values[name]) for name in TOLD},
        "modelspec.architecture": "lumina-2/lora",
        "modelspec.implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        "modelspec.resolution": "1024x1024",
    }
