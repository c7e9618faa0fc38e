"""Assembly of Lumina Image 2.0: a transformer of one stream, Gemma 2 as text encoder, 16-channel latents.

Start here to read this package.
"""

from dataclasses import replace
from functools import partial

from library.architectures.lumina.gemma import load_gemma_tokenizer
from library.architectures.lumina.load import TRANSFORMER, open_loader
from library.architectures.lumina.options import LuminaOptions
from library.architectures.lumina.text import LuminaText
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import build_predicted_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.dit_loader import DitLoader
from library.models.next_dit import predict
from library.models.recipe import build_flow_recipe, tokenizer_folders
from library.models.transformer_file import file_parts
from library.models.vae.flux import map_latents
from library.protocols import Architecture, LiveText, Preview, PromptDefaults, TextCacheSpec

GEMMA_TOKENS = 256
RECIPE = replace(
    build_flow_recipe(
        "Lumina Image 2.0",
        "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        "lumina2",
        "lumina-2",
        weighted_captions="Gemma has no prompt weighting",
        clip_skip="Lumina Image 2.0 uses Gemma's states before its last layer",
        max_token_length="use --gemma2_max_token_length",
        vae="use --ae",
    ),
    title="Lumina",
)
CODEC = map_latents("_lumina.npz")
LATENTS = CODEC.spec
# The model predicts toward the image, the opposite of most flow models.
build_objective = partial(build_predicted_flow, target_kind="latent - noise")


def build(options: LuminaOptions) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit Lumina Image 2.0.
    """
    RECIPE.check(options)
    loader = open_loader(options)
    text = build_text(options, loader)
    return Architecture(
        **file_parts(TRANSFORMER, RECIPE, options, loader, list_specs()),
        text=text,
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        preview=build_preview(text),
        text_cache=build_text_cache(options, loader, text),
    )


def build_text(options: LuminaOptions, loader: DitLoader) -> LuminaText:
    """Build the text pipeline; its tokenizer is searched next to the base model and the encoder.

    Raises UserError for a --system_prompt that leaves no room for a caption.
    """
    folders = tokenizer_folders(loader.path, options.parts.gemma2)
    text = LuminaText(
        load_gemma_tokenizer(folders, options.model.tokenizer_cache_dir, loader.num_words),
        num_tokens=options.parts.gemma2_max_token_length or GEMMA_TOKENS,
        system_prompt=options.parts.system_prompt,
    )
    # A space, because an empty caption gets no instruction.
    num_instruction = text.count_tokens(" ") if text.system_prompt else 0
    if num_instruction >= text.max_tokens:
        raise about("--system_prompt")(
            f"has {num_instruction} tokens, which leaves no room for a caption within --gemma2_max_token_length "
            f"{text.num_tokens}",
            "shorten the prompt or raise the limit",
        )
    return text


def build_text_cache(options: LuminaOptions, loader: DitLoader, text: LuminaText) -> TextCacheSpec:
    keys = ("hidden_state", "attention_mask", "input_ids")
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_lumina_te.npz",
        keys=keys,
        encoders=lambda: fingerprint(loader.text.component.weights),
        settings=f"{loader.dtype} {text.num_tokens} {text.system_prompt}",
        tokenizers=(text.tokenizer,),
        on_host=("attention_mask",),
        live=LiveText(loader.text_encoders, keys, text.encode, 1),
    )


def build_preview(text: LuminaText) -> Preview:
    """Build the preview settings of sd-scripts: guidance only in the first quarter of the steps, its norm limited to
    that of the unguided prediction."""
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
        # `format_prompt` adds the instruction to prompts alone: negative prompts get none.
        text=replace(text, system_prompt=""),
        predict=lambda prompt: predict,
        sampler=partial(build_shifted_sampler, predicts="latent - noise"),
        format_prompt=text.with_instruction,
    )
