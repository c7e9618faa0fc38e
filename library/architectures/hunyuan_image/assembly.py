"""Assembly of HunyuanImage 2.1: a transformer of double and single streams, Qwen2.5-VL and ByT5, 64-channel latents of
32 pixels.

Start here to read this package.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from library.architectures.hunyuan_image.load import MODEL, SPEC, TRANSFORMER, open_loader
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.architectures.hunyuan_image.qwen import load_qwen_tokenizer
from library.architectures.hunyuan_image.text import HunyuanImageText
from library.architectures.hunyuan_image.vae import SCALE
from library.architectures.specs import list_specs
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import RECORDS, build_predicted_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.dit_loader import DitLoader
from library.models.prediction import build_predict
from library.models.recipe import build_flow_recipe, explain_ignored_attention, folders_of
from library.models.transformer_file import file_parts
from library.models.vae.latents import KlLatents
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

SAMPLING_SHIFT = 5.0  # used by the model to sample images
RECIPE = build_flow_recipe(
    MODEL,
    "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1",
    "hunyuan-image-2.1",
    "hunyuan-image-2.1",
    resolution="2048x2048",
    weighted_captions="Qwen2.5-VL has no prompt weighting",
    refuses={"network_train_text_encoder_only": "its text encoders cannot be trained"},
    records=[*(name for name in RECORDS if name != "weighting_scheme"), "text_encoder_lr"],
    needs={"transformers": ">=5", "diffusers": ">=0.36"},  # rope_parameters; AutoencoderKLHunyuanImage
    clip_skip="it has no CLIP",
    max_token_length="its text encoder reads 1024 tokens",
)
LATENTS = SPEC
# sd-scripts gives the model whole timesteps too; previews use the exact levels.
build_objective = partial(build_predicted_flow, tells_whole_timesteps=True)

predict = build_predict("vlm_embed", "vlm_mask", "byt5_embed", "byt5_mask", takes_timesteps=True)


def build(options: HunyuanImageOptions) -> Architecture:
    """Assemble the HunyuanImage 2.1 model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit HunyuanImage 2.1.
    """
    RECIPE.check(options)
    loader = open_loader(options)
    text = build_text(options, loader)
    recipe = replace(RECIPE, ignores={**RECIPE.ignores, **explain_ignored_attention(options.parts.attn_mode)})
    return Architecture(
        **file_parts(TRANSFORMER, recipe, options, loader, list_specs()),
        text=text,
        codec=KlLatents(SPEC, SCALE),
        objective=build_objective(options),
        predict=predict,
        # Plain classifier-free guidance; --fs of a prompt shifts the noise levels.
        preview=Preview(
            PromptDefaults(num_steps=20, width=512, height=512, scale=3.5, size_step=32, flow_shift=SAMPLING_SHIFT),
            text,
            lambda prompt: predict,
            build_shifted_sampler,
        ),
        text_cache=build_text_cache(options, loader, text),
    )


def build_text(options: HunyuanImageOptions, loader: DitLoader) -> HunyuanImageText:
    """Build the text pipeline. Qwen's tokenizer is searched next to the base model and the text encoder; ByT5's has
    no files."""
    from transformers import ByT5Tokenizer

    encoder_path = options.parts.text_encoder
    model_folders = folders_of(loader.path, encoder_path)
    folders = [folder / "tokenizer" for folder in model_folders]
    if encoder_path and Path(encoder_path).expanduser().is_dir():
        folders.append(model_folders[1])
    cache_dir = options.model.tokenizer_cache_dir
    return HunyuanImageText(load_qwen_tokenizer(folders, cache_dir, loader.num_words), ByT5Tokenizer())


def build_text_cache(options: HunyuanImageOptions, loader: DitLoader, text: HunyuanImageText) -> TextCacheSpec:
    """Return the cache format, which matches sd-scripts'."""

    def encoders() -> str:
        qwen, byt5 = (part.component for part in loader.texts)
        # A folder may set another number of heads, which no weight shows.
        return f"{fingerprint(qwen.weights, byt5.weights)} {qwen.config['num_attention_heads']}"

    return TextCacheSpec(
        options=options.text_caching,
        suffix="_hi_te.npz",
        keys=("vlm_embed", "vlm_mask", "byt5_embed", "byt5_mask", "ocr_mask"),
        encoders=encoders,
        settings=f"{loader.text.dtype} {options.parts.fp8_vl}",
        tokenizers=(text.qwen_tokenizer, text.byt5_tokenizer),
        padding={"vlm_embed": 0.0, "vlm_mask": 0.0},
        can_train=False,
    )
