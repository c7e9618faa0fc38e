"""Assembly of Z-Image: a transformer of one stream, Qwen3 4B as text encoder, 16-channel latents.

Start here to read this package.
"""

from functools import partial

from library.architectures.zimage.load import FILES, open_loader
from library.architectures.zimage.options import ZImageOptions
from library.architectures.zimage.text import NUM_TOKENS, build_chat_text
from library.diffusion.flow import build_predicted_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.distilled import DistilledRelease, recognise_distilled
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import build_recipe, load_tokenizer, shared_parts, ways_to_build
from library.models.next_dit import predict
from library.models.vae.flux import map_latents
from library.protocols import Architecture, Preview, PromptDefaults

TURBO = DistilledRelease(
    "--model_version",
    advice="Z-Image Turbo, which is distilled: training undoes the distillation, and previews blur. Add "
    "--training_adapter with a training adapter for Turbo, or train on Z-Image or Z-Image-De-Turbo. If it is not "
    "Turbo, set --model_version",
)
SAMPLING_SHIFT = 3.0  # used by the model to sample images
RECIPE = build_recipe(
    FILES.transformer,
    "https://github.com/Tongyi-MAI/Z-Image",
    weighted_captions="Qwen3 has no prompt weighting",
    clip_skip="Z-Image uses Qwen3's states before its last layer",
    num_tokens=NUM_TOKENS,
)
CODEC = map_latents("_zimage.npz", takes_mean=True)  # as diffusers' and musubi-tuner's training does
LATENTS = CODEC.spec
# The model predicts toward the image, the opposite of most flow models.
build_objective = partial(build_predicted_flow, target_kind="latent - noise")


def assemble(options: ZImageOptions, loader: DitLoader, is_trained: bool) -> Architecture:
    turbo = is_trained and recognise_distilled(TURBO, options.parts.model_version, options.network, loader.path)
    text = build_chat_text(load_tokenizer(FILES.encoder, options, loader))
    return Architecture(
        **shared_parts(FILES, RECIPE, options, loader, text, "_zimage_te.npz"),
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        # Plain classifier-free guidance, or few steps without guidance for Turbo.
        preview=Preview(
            PromptDefaults(*((8, 1024, 1024, 1.0) if turbo else (50, 1024, 1024, 5.0)), 16, flow_shift=SAMPLING_SHIFT),
            text,
            lambda prompt: predict,
            partial(build_shifted_sampler, predicts="latent - noise"),
        ),
    )


build, build_for_caching, open_vae = ways_to_build(FILES, RECIPE, open_loader, assemble)
