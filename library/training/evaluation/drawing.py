"""Draws an image of a prompt: its texts, its noise, the denoising and the decoding."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from library.base.errors import UserError, about, error_in
from library.base.randomness import generator_for
from library.diffusion.guidance import apply_guidance, needs_negative
from library.protocols import Architecture, LiveText
from library.training.evaluation.prompt_images import prompt_conditioning, resolve_seen_text
from library.training.failures.vae_memory import VaeFallback
from library.training.reporting.sample_images import to_image
from library.training.step.context import Autocast, StepContext
from library.training.step.denoising import denoise
from library.types import Batch, Conditioning, Noised, Prompt


def collect_texts(prompts: Sequence[Prompt], arch: Architecture) -> list[str]:
    """Return the distinct texts to encode for the prompts."""
    texts = [text for p in prompts for text in texts_of_prompt(p, arch)[: 2 if needs_negative(p) else 1]]
    return list(dict.fromkeys(texts))


def texts_of_prompt(prompt: Prompt, arch: Architecture) -> tuple[str, str]:
    """Return a prompt's positive and negative text as the text encoders get them."""
    return resolve_seen_text(prompt, arch.preview.format_prompt(prompt.text), arch), resolve_seen_text(
        prompt, prompt.negative, arch
    )


def encode_prompts(
    arch: Architecture,
    text_encoders: Sequence[nn.Module],
    autocast: Autocast,
    prompts: Sequence[Prompt],
    live: LiveText | None = None,
    cached: Mapping[str, Conditioning] | None = None,
) -> dict[str, Conditioning]:
    """Encode the texts of the prompts one by one, without gradient. Return their conditioning on the CPU.

    If only the encoders of `live` are in memory, `cached` holds the features of the others, by text.
    """
    encode = arch.preview.text.encode if live is None else live.encode
    encoded: dict[str, Conditioning] = {}
    with torch.no_grad(), autocast():
        for text in collect_texts(prompts, arch):
            features = encode(text_encoders, arch.preview.text.tokenize([text]))
            cached_features = {} if cached is None else cached[text]
            encoded[text] = {**cached_features, **{name: tensor.cpu() for name, tensor in features.items()}}
    return encoded


def seed_generator(prompt: Prompt, run_seed: int, index: int) -> torch.Generator:
    """Return the CPU generator of an image: with the prompt's seed, or a stream of the run that is the same at every
    event."""
    if prompt.seed is None:
        return generator_for(run_seed, "preview", index)
    return torch.Generator().manual_seed(prompt.seed)


def draw_latents(
    context: StepContext,
    prompt: Prompt,
    encoded: Mapping[str, Conditioning],
    generator: torch.Generator,
    goes_on: Callable[[], bool] = lambda: True,
    vae: nn.Module | None = None,
) -> Tensor | None:
    """Denoise one image. Return latents for `LatentCodec.decode`, float32, or None if `goes_on` returned False.

    `goes_on` is called after each denoiser call. The initial noise is the first draw from `generator`, as in other
    programs, so that images are comparable. `vae` encodes the prompt's reference images. Raises UserError if the
    denoiser returns NaN.
    """
    spec, preview = context.arch.codec.spec, context.arch.preview
    if preview.draw is not None:
        with context.autocast():
            return require_finite(preview.draw(context.models.denoiser, prompt, generator, goes_on))
    shape = (1, spec.channels, prompt.height // spec.downscale, prompt.width // spec.downscale)
    sampler, predict, batch = preview.sampler(prompt), preview.predict(prompt), build_batch(prompt)
    predict_negative = (preview.predict_negative or preview.predict)(prompt)
    texts = texts_of_prompt(prompt, context.arch)
    positive, negative = (move_conditioning(encoded.get(text), context.device) for text in texts)
    if positive is None:
        raise make_reference_error(prompt)
    # initial_seed draws nothing, so that the noise stays the first draw.
    extra = prompt_conditioning(context, vae, prompt, batch, generator.initial_seed())

    def predict_guided(noised: Noised, progress: float) -> Tensor:
        def predict_conditional(conditioning: Conditioning) -> Tensor:
            call = predict_negative if conditioning is negative else predict
            with context.autocast():
                return call(context.models.denoiser, noised, {**conditioning, **extra}, batch)

        return apply_guidance(predict_conditional, positive, negative, prompt, progress)

    # Drawn on the CPU and then moved: a GPU's generator gives other numbers for the same seed.
    noise_BCHW = torch.randn(shape, generator=generator).to(context.device)
    latents_BCHW = denoise(sampler, predict_guided, sampler.start(noise_BCHW), generator, goes_on=goes_on)
    return require_finite(latents_BCHW)


def require_finite(latents_BCHW: Tensor | None) -> Tensor | None:
    """Return the latents of a preview. Raises UserError if they are NaN."""
    if latents_BCHW is not None and not latents_BCHW.isfinite().all():
        raise UserError("the latents are NaN: the denoiser overflows, or the adapter has diverged")
    return latents_BCHW


def make_reference_error(prompt: Prompt) -> UserError:
    """Return the error for a prompt whose reference images changed after its features were cached."""
    assert prompt.reference_paths, "the features of a prompt without images are kept under its text"
    gone = [path for path in prompt.reference_paths if not path.is_file()]
    names = ", ".join(map(str, gone or prompt.reference_paths))
    return about("--ci")(
        f"{names} {'is gone' if gone else 'has changed'} since the run began, and the text encoder, which saw it, has "
        "left memory",
        "put the file back as it was, or stop and continue with --resume to use the new one",
    )


def decode(context: StepContext, vae: nn.Module, latents_BCHW: Tensor, fallback: VaeFallback) -> Image.Image:
    """Decode latents to an image. Raises UserError if the VAE returns NaN."""
    pixels_BCHW = fallback.run(vae, lambda: context.arch.codec.decode(vae, latents_BCHW))
    if not pixels_BCHW.isfinite().all():
        raise error_in("--no_half_vae", cause="needs")(
            "the VAE gives NaN", "add --no_half_vae, or use a VAE made for fp16"
        )
    return to_image(pixels_BCHW[0])


def move_conditioning(conditioning: Conditioning | None, device: torch.device) -> Conditioning | None:
    return None if conditioning is None else {name: tensor.to(device) for name, tensor in conditioning.items()}


def build_batch(prompt: Prompt) -> Batch:
    """Return a prompt as a batch of one uncropped sample."""
    size: list[Any] = [prompt.height, prompt.width]
    return Batch(
        keys=["preview"],
        captions=[prompt.text],
        pixels_BCHW=None,
        latents_BCHW=None,
        conditioning=None,
        loss_weights_B=torch.ones(1),
        masks_B1HW=None,
        sizes_B6=torch.tensor([[*size, 0, 0, *size]]),
        attributes=[{}],
    )
