"""FLUX.1: a transformer of double and single streams, CLIP-L and T5-XXL, 16-channel latents.

The assembly, and the table of contents of this package.
"""

from functools import partial

import torch

from library.architectures.cards import list_cards
from library.architectures.flux.adapters import view
from library.architectures.flux.load import FluxLoader, open_loader
from library.architectures.flux.options import FluxOptions
from library.architectures.flux.predict import predict, preview_sampler
from library.architectures.flux.text import FluxText
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import IGNORES, FlowMatching, build_sampled_flow
from library.errors import UserError
from library.models.clip_tokenizer import load_tokenizer
from library.models.clip_tokens import ClipTokens
from library.models.flux_vae import mapped_latents
from library.models.recipe import OTHER_ATTENTION, Recipe, folders_beside
from library.models.t5 import load_t5_tokenizer
from library.protocols import Architecture, LiveText, Preview, PromptDefaults, TextCacheSpec

T5_TOKENS_DEV, T5_TOKENS_SCHNELL = 512, 256
RECIPE = Recipe(
    title="FLUX.1",
    metadata={
        "ss_base_model_version": "flux1",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.resolution": "1024x1024",
    },
    refuses={"weighted_captions": "T5 knows no weighted words"},
    ignores={
        **IGNORES,
        "v_parameterization": "FLUX.1 predicts the velocity of a flow",
        "clip_skip": "FLUX.1 takes CLIP's pooled state",
        "max_token_length": "T5 reads captions in one piece; use --t5xxl_max_token_length",
        "vae": "use --ae",
        "controlnet_model_name_or_path": "adapters are trained without a ControlNet",
        **OTHER_ATTENTION,
    },
    records=(
        "model_type", "apply_t5_attn_mask", "guidance_scale", "weighting_scheme", "logit_mean", "logit_std",
        "mode_scale", "timestep_sampling", "sigmoid_scale", "model_prediction_type", "discrete_flow_shift",
    ),
)  # fmt: skip
CODEC = mapped_latents("_flux.npz")
LATENTS = CODEC.spec


def build(options: FluxOptions) -> Architecture:
    """The parts of the FLUX.1 model that the options name; none is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit FLUX.1.
    """
    RECIPE.check(options)
    if options.flux.model_type == "chroma":
        raise UserError("--model_type chroma is not supported yet; train FLUX.1 with --model_type flux")
    loader = open_loader(options)
    text = build_text(options, loader)
    masks_text = options.flux.apply_t5_attn_mask
    kind = "schnell" if loader.is_schnell else "dev"
    schnell_ignores = {"guidance_scale": "FLUX.1 schnell has no input for it"} if loader.is_schnell else {}
    return Architecture(
        name="flux",
        load=loader,
        text=text,
        codec=CODEC,
        objective=build_objective(options),
        predict=partial(predict, guidance=options.flux.guidance_scale, masks_text=masks_text),
        view=view,
        preview=build_preview(text, loader, masks_text),
        metadata=RECIPE.describe(options, architecture=f"flux-1-{kind}/lora"),
        cards=list_cards(),
        ignores={**RECIPE.ignores, **schnell_ignores},
        text_cache=build_text_cache(options, loader, text),
    )


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
    folders = folders_beside(loader.path, options.flux.t5xxl)
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
        tokenizers=(text.clip.tokenizer, text.t5_tokenizer),
        constants={"txt_ids": torch.zeros(text.num_t5_tokens, 3), "apply_t5_attn_mask": torch.tensor(masks)},
        live=LiveText(lambda: [loader.clip_l()], ("l_pooled",), text.encode_clip, 1, excluded_by="train_t5xxl"),
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
