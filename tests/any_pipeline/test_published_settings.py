"""Settings of published models that the classes do not have by default are trained as a step in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.measuring import measure
from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.test_convention import SIZE, compare_with_float64, parts_of
from tests.hiding import lazily
from tests.tiers import first_is_fast
from tests.tiny.pipeline_parts import vae
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, unet, watch_pipeline
from tests.tolerances import FLOAT32_SAME_MATH

diffusers = lazily("diffusers")


def rebuild(model: Any, **settings: Any) -> nn.Module:
    """Return a new model of the same class with some other settings."""
    old = {name: value for name, value in model.config.items() if not name.startswith("_")}
    made: nn.Module = type(model).from_config({**old, **settings})
    return made


def tiny_vae(_: Any) -> nn.Module:
    made: nn.Module = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )  # fmt: skip
    return made


Change = Callable[[Any], Any]
STATISTICS = {"scaling_factor": 0.5, "latents_mean": [-1.6, 0.7, 0.1, 0.2], "latents_std": [8.4, 5.9, 3.0, 2.0]}
SETTINGS: Mapping[str, tuple[str, Mapping[str, Change]]] = {
    "SD 3 without T5": (
        "StableDiffusion3Pipeline", {"text_encoder_3": lambda _: None, "tokenizer_3": lambda _: None}),
    "PixArt-alpha told size and ratio": (
        "PixArtAlphaPipeline", {
            "transformer": lambda old: rebuild(old, sample_size=128, use_additional_conditions=True)}),
    "HunyuanDiT 1.1 told style and size": (
        "HunyuanDiTPipeline", {"transformer": lambda old: rebuild(old, use_style_cond_and_image_meta_size=True)}),
    "a VAE without a posterior": ("StableDiffusionPipeline", {"vae": tiny_vae}),
    "a VAE with statistics": ("StableDiffusionXLPipeline", {"vae": lambda _: vae(4, shift_factor=None, **STATISTICS)}),
    "a U-Net that is told the guidance": (
        "StableDiffusionPipeline", {"unet": lambda _: unet(time_cond_proj_dim=16)}),
    "FLUX.1 schnell": (
        "FluxPipeline", {
            "transformer": lambda old: rebuild(old, guidance_embeds=False),
            "scheduler": lambda old: type(old).from_config(old.config, use_dynamic_shifting=False)}),
}  # fmt: skip


@pytest.mark.parametrize("case", first_is_fast(sorted(SETTINGS)))
def test_a_setting_is_trained_as_a_step_in_float64(case: str) -> None:
    name, changes = SETTINGS[case]

    def build() -> Any:
        def parts() -> dict[str, Any]:
            own = PIPELINES[name]()
            return {**own, **{key: change(own[key]) for key, change in changes.items()}}

        return build_tiny_pipeline(name, builder=parts)

    watched = watch_pipeline(build())
    convention, maps = measure(watched, SIZE)
    require_exact(check(watched, convention, maps))
    compare_with_float64(build, watched, convention, maps, steps=4)


def ltx_with_levels() -> Any:
    """Build LTX-Video 0.9.1, whose VAE is told a noise level."""
    pipe = build_published(find_model("LTXPipeline"), "LTXPipeline")
    blocks = len(pipe.vae.config.decoder_block_out_channels) + 1
    pipe.vae = rebuild(pipe.vae, timestep_conditioning=True, decoder_inject_noise=(False,) * blocks).eval()
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "vae_name", "others", "options"),
    [
        (ltx_with_levels, "vae", (torch.zeros(1),), {}),
        (lambda: build_tiny_pipeline("Kandinsky3Pipeline"), "movq", (), {"force_not_quantize": True}),
    ],
)
def test_images_are_decoded_with_what_the_pipeline_tells_its_vae(
    build: Callable[[], Any], vae_name: str, others: tuple[Any, ...], options: dict[str, Any]
) -> None:
    pipe = build()
    watched = watch_pipeline(pipe)
    convention, maps = measure(watched, SIZE)
    _, codec, _ = parts_of(watched, convention, maps)
    raw = torch.randn(convention.latent_shape, generator=torch.Generator().manual_seed(3))
    latents = convention.latents_of(raw.reshape(1, raw.shape[1], *raw.shape[-2:]))
    own = getattr(pipe, vae_name)
    expected = own.decode(raw, *others, **options).sample
    actual = codec.decode(own, latents)
    torch.testing.assert_close(actual, expected.reshape(actual.shape), **FLOAT32_SAME_MATH)
