"""Assembly of Anima: Cosmos-Predict2's transformer, a text adapter from Qwen3 to T5 tokens, and Qwen-Image's VAE.

Start here to read this package.
"""

from pathlib import Path

import torch

from library.architectures.anima.load import QWEN3, open_loader
from library.architectures.anima.options import AnimaOptions
from library.architectures.anima.text import AnimaText
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import RECORDS, FlowMatching, build_sampled_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.adapter_views import view_both
from library.models.dit_loader import DitLoader
from library.models.prediction import build_predict
from library.models.qwen3 import load_qwen3_tokenizer
from library.models.recipe import build_flow_recipe, explain_ignored_attention, folders_of
from library.models.t5 import holds_t5_tokenizer, load_t5_tokenizer
from library.models.vae.qwen_image import qwen_image_latents
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

QWEN3_TOKENIZER, T5_TOKENIZER = "tokenizer", "t5_tokenizer"  # folders next to the files, named as in diffusers folders
RECIPE = build_flow_recipe(
    "Anima",
    "https://huggingface.co/circlestone-labs/Anima",
    "anima",
    "anima-preview",
    weighted_captions="Qwen3 has no prompt weighting",
    records=[*(name for name in RECORDS if name != "model_prediction_type"), "text_encoder_lr"],
    needs={"diffusers": ">=0.35"},  # AutoencoderKLQwenImage
    clip_skip="Anima uses Qwen3's last hidden states",
    max_token_length="use --qwen3_max_token_length and --t5_max_token_length",
)
CODEC = qwen_image_latents("_anima.npz")
LATENTS = CODEC.spec

predict = build_predict("prompt_embeds", "attn_mask", "t5_input_ids", "t5_attn_mask")


def build(options: AnimaOptions) -> Architecture:
    """Assemble the Anima model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit Anima.
    """
    RECIPE.check(options)
    loader, config = open_loader(options)
    text = build_text(options, loader, config.adapter.num_words)
    return Architecture(
        name="anima",
        load=loader,
        text=text,
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        view=view_both,
        preview=Preview(
            PromptDefaults(num_steps=30, width=512, height=512, scale=7.5, size_step=16, flow_shift=3.0),
            text,
            lambda prompt: predict,
            build_shifted_sampler,
        ),
        metadata=RECIPE.describe(options),
        specs=list_specs(),
        ignores={**RECIPE.ignores, **explain_ignored_attention(options.computing.attn_mode)},
        text_cache=build_text_cache(options, loader, text),
    )


def build_objective(options: AnimaOptions) -> FlowMatching:
    # sd-scripts applies --weighting_scheme to Anima's loss always, to FLUX.1's only with sigma_scaled.
    return build_sampled_flow(options, always_weights_loss=True)


def build_text(options: AnimaOptions, loader: DitLoader, num_t5_words: int) -> AnimaText:
    """Build the text pipeline. Both tokenizers are searched next to the text encoder and the base model.

    Raises UserError if --t5_tokenizer_path, which replaces these folders for T5's, has no tokenizer.
    """
    text, cache_dir = options.text, options.model.tokenizer_cache_dir
    # --qwen3 may be a folder of transformers, with the tokenizer beside the weights.
    folders = folders_of(text.qwen3, loader.path)
    qwen3_folders = [folders[0], *(folder / QWEN3_TOKENIZER for folder in folders)]
    t5_folders = [folder / T5_TOKENIZER for folder in folders]
    if text.t5_tokenizer_path:
        t5_folders = [Path(text.t5_tokenizer_path).expanduser()]
        if not holds_t5_tokenizer(t5_folders[0]):
            raise about("--t5_tokenizer_path", text.t5_tokenizer_path)("lacks tokenizer.json and spiece.model")
    return AnimaText(
        qwen3_tokenizer=load_qwen3_tokenizer(QWEN3, qwen3_folders, cache_dir, loader.num_words),
        t5_tokenizer=load_t5_tokenizer(t5_folders, cache_dir, num_t5_words),
        num_qwen3_tokens=text.qwen3_max_token_length,
        num_t5_tokens=text.t5_max_token_length,
    )


def build_text_cache(options: AnimaOptions, loader: DitLoader, text: AnimaText) -> TextCacheSpec:
    """Return the cache format, which matches sd-scripts'."""
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_anima_te.npz",
        keys=("prompt_embeds", "attn_mask", "t5_input_ids", "t5_attn_mask"),
        encoders=lambda: fingerprint(loader.text.component.weights),
        settings=f"{loader.dtype} {text.identity}",
        tokenizers=(text.qwen3_tokenizer, text.t5_tokenizer),
        # sd-scripts would apply the rate of the file in every later run. Here dropped captions are cached separately.
        constants={"caption_dropout_rate": torch.tensor(0.0)},
    )
