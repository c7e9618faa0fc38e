"""FLUX.1: a transformer of double and single streams, CLIP-L and T5-XXL, 16-channel latents.

The assembly, and the table of contents of this package.
"""

import logging
from functools import partial
from pathlib import Path

import torch

from library.architectures.flux.load import FluxLoader, open_loader
from library.architectures.flux.options import FluxOptions
from library.architectures.flux.predict import predict, preview_sampler
from library.architectures.flux.text import FluxText
from library.architectures.flux.view import view
from library.architectures.interface import Architecture, LiveText, Preview, PromptDefaults, TextCacheSpec
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import FlowMatching, build_sampled_flow
from library.models.clip_tokenizer import load_tokenizer
from library.models.clip_tokens import ClipTokens
from library.models.t5 import load_t5_tokenizer
from library.models.vae16 import mapped_latents

logger = logging.getLogger(__name__)

T5_TOKENS_DEV, T5_TOKENS_SCHNELL = 512, 256
FOREIGN = {  # option -> why it does nothing here
    "v_parameterization": "FLUX.1 predicts the velocity of a flow",
    "clip_skip": "FLUX.1 takes CLIP's pooled state",
    "max_token_length": "T5 reads captions in one piece; use --t5xxl_max_token_length",
    "vae": "use --ae",
    "controlnet_model_name_or_path": "adapters are trained without a ControlNet",
    "xformers": "attention is torch's scaled dot product",
    "mem_eff_attn": "attention is torch's scaled dot product, which needs as little memory",
}

TOLD = (  # options that files tell as ss_*
    "model_type", "apply_t5_attn_mask", "guidance_scale", "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
    "timestep_sampling", "sigmoid_scale", "model_prediction_type", "discrete_flow_shift",
)  # fmt: skip


def build(options: FluxOptions) -> Architecture:
    """The parts of the FLUX.1 model that the options name; none is loaded yet.

    Raises ValueError naming the flag for a file or a setting that does not fit FLUX.1.
    """
    refuse_settings(options)
    loader = open_loader(options)
    text = build_text(options, loader)
    masks_text = options.flux.apply_t5_attn_mask
    if loader.is_schnell and options.flux.guidance_scale != type(options.flux)().guidance_scale:
        logger.warning("--guidance_scale has no effect: FLUX.1 schnell has no input for it")
    return Architecture(
        name="flux",
        load=loader,
        text=text,
        codec=mapped_latents("_flux.npz"),
        objective=build_objective(options),
        predict=partial(predict, guidance=options.flux.guidance_scale, masks_text=masks_text),
        view=view,
        preview=build_preview(text, loader, masks_text),
        metadata=metadata(options, loader.is_schnell),
        text_cache=build_text_cache(options, loader, text),
    )


def refuse_settings(options: FluxOptions) -> None:
    """Raise ValueError for settings of other models; warn of those that only do nothing."""
    if options.flux.model_type == "chroma":
        raise ValueError("--model_type chroma is not supported yet; train FLUX.1 with --model_type flux")
    if options.model.weighted_captions:
        raise ValueError("--weighted_captions does not work with FLUX.1: T5 knows no weighted words; leave it out")
    values = options.flat()
    for name, why in FOREIGN.items():
        if values[name]:
            logger.warning("--%s has no effect: %s", name, why)


def build_objective(options: FluxOptions) -> FlowMatching:
    return build_sampled_flow(
        options,
        options.flow_sampling,
        options.flow_weighting,
        prediction_type=options.flow_prediction.model_prediction_type,
    )


def build_text(options: FluxOptions, loader: FluxLoader) -> FluxText:
    """Both tokenizers, looked for beside the base model and beside each encoder."""
    usual = T5_TOKENS_SCHNELL if loader.is_schnell else T5_TOKENS_DEV
    length = options.flux.t5xxl_max_token_length
    if length is not None and length < 2:
        raise ValueError(f"--t5xxl_max_token_length is {length}; use 2 or more, {usual} is usual")
    base = loader.path if loader.path.is_dir() else loader.path.parent
    beside = [base] + ([Path(options.flux.t5xxl).expanduser()] if options.flux.t5xxl else [])
    folders = [folder if folder.is_dir() else folder.parent for folder in beside]
    cache_dir = options.model.tokenizer_cache_dir
    return FluxText(
        clip=ClipTokens(load_tokenizer(loader.path, cache_dir, loader.num_clip_words)),
        t5_tokenizer=load_t5_tokenizer([f / "tokenizer_2" for f in folders], cache_dir, loader.num_t5_words),
        num_t5_tokens=usual if length is None else length,
        masks_padding=options.flux.apply_t5_attn_mask,
    )


def build_text_cache(options: FluxOptions, loader: FluxLoader, text: FluxText) -> TextCacheSpec:
    """Files that hold what sd-scripts' do; its `txt_ids` are the places of the text tokens, which are all zero."""
    masks = options.flux.apply_t5_attn_mask

    def identity() -> str:
        encoders = fingerprint(loader.clip.weights, loader.t5.weights)
        return f"{encoders} {loader.clip.config['hidden_act']} {loader.dtype} {text.num_t5_tokens} {masks}"

    return TextCacheSpec(
        options=options.text_caching,
        suffix="_flux_te.npz",
        keys=("l_pooled", "t5_out", "t5_attn_mask"),
        identity=identity,
        constants={"txt_ids": torch.zeros(text.num_t5_tokens, 3), "apply_t5_attn_mask": torch.tensor(masks)},
        live=LiveText(lambda: [loader.clip_l()], ("l_pooled",), text.encode_clip, excluded_by="train_t5xxl"),
    )


def build_preview(text: FluxText, loader: FluxLoader, masks_text: bool) -> Preview:
    """Pictures as the model was made to draw them: distilled guidance, a schedule that depends on the size."""
    guidance = PromptDefaults(
        num_steps=20, width=512, height=512, scale=1.0, size_step=16, guidance_scale=None if loader.is_schnell else 3.5
    )
    return Preview(
        defaults=guidance,
        text=text,
        predict=lambda prompt: partial(predict, guidance=prompt.guidance_scale or 0.0, masks_text=masks_text),
        sampler=lambda prompt: preview_sampler(prompt, is_shifted=not loader.is_schnell),
    )


def metadata(options: FluxOptions, is_schnell: bool) -> dict[str, str]:
    """What files trained on this base model say about it."""
    values = options.flat()
    return {
        "ss_v2": "False",
        "ss_base_model_version": "flux1",
        **{f"ss_{name}": str(values[name]) for name in TOLD},
        "modelspec.architecture": f"flux-1-{'schnell' if is_schnell else 'dev'}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.resolution": "1024x1024",
    }
