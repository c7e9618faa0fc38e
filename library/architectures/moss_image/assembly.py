"""Assembly of MOSS-Image: a transformer of one stream, Qwen3.5 9B as text encoder, 128-channel latents of 16 pixels. It
generates images from text, and can be trained to edit reference images.

Start here to read this package.
"""

from dataclasses import replace

from library.architectures.moss_image.levels import draw_levels, preview_sampler
from library.architectures.moss_image.load import FILES, open_loader
from library.architectures.moss_image.options import OWN_SAMPLING, MossImageOptions
from library.architectures.moss_image.text import NUM_TOKENS, MossImageText
from library.diffusion.flow import FlowMatching, build_predicted_flow
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import build_recipe, load_tokenizer, shared_parts, ways_to_build
from library.models.prediction import build_predict
from library.models.vae.flux_2 import pack_latents
from library.protocols import Architecture, Preview, PromptDefaults

RECIPE = build_recipe(
    FILES.transformer,
    "https://huggingface.co/openmoss/MOSS-Image-Base",
    weighted_captions="Qwen3.5 has no prompt weighting",
    clip_skip="MOSS-Image uses Qwen3.5's last states",
    num_tokens=NUM_TOKENS,
    needs={"diffusers": ">=0.36", "transformers": ">=5.3"},  # AutoencoderKLFlux2, Qwen3.5
)
# The names of sd-scripts' caches are unknown, so these differ from the pattern of its others.
CODEC = pack_latents("_moss_latents.npz", max_references=10)  # the model has no limit of its own
LATENTS = CODEC.spec
FEATURES = ("hidden_state", "attention_mask")
SKIPPED = (22,)  # blocks that the model's pipeline leaves out for the negative prompt
predict = build_predict(*FEATURES, has_references=True)
predict_without_block = build_predict(*FEATURES, has_references=True, skipped=SKIPPED)


def assemble(options: MossImageOptions, loader: DitLoader, is_trained: bool) -> Architecture:
    text = MossImageText(load_tokenizer(FILES.encoder, options, loader))
    return Architecture(
        **shared_parts(FILES, RECIPE, options, loader, text, "_moss_text.npz", settings=text.tokenizer.chat_template),
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        preview=Preview(
            PromptDefaults(50, 1024, 1024, scale=3.0, size_step=LATENTS.bucket_step, flow_shift=5.0),
            text,
            lambda prompt: predict,
            preview_sampler,
            predict_negative=lambda prompt: predict_without_block,
        ),
    )


build, build_for_caching, open_vae = ways_to_build(FILES, RECIPE, open_loader, assemble)


def build_objective(options: MossImageOptions) -> FlowMatching:
    objective = build_predicted_flow(options, patch=1)
    if options.flow_sampling.timestep_sampling != OWN_SAMPLING:
        return objective
    return replace(objective, draw_levels=draw_levels, takes_offset=False)
