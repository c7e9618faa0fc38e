"""Knots: the assembly, and the table of contents of this package."""

from library.architectures.knots.layers import view
from library.architectures.knots.load import open_loader
from library.architectures.knots.options import KnotsOptions
from library.architectures.knots.predict import predict
from library.architectures.knots.text import ByteText
from library.architectures.specs import list_specs
from library.diffusion.objective import build_ddpm
from library.models.recipe import OTHER_ATTENTION, Recipe
from library.models.unet.preview import build_unet_preview
from library.models.vae.latents import KlLatents
from library.protocols import Architecture, LatentSpec

RECIPE = Recipe(
    title="Knots",
    metadata={"ss_base_model_version": "knots1", "modelspec.architecture": "knots-1/lora"},
    refuses={"weighted_captions": "bytes have no weights"},
    ignores={"clip_skip": "there is no CLIP", **OTHER_ATTENTION},
)
LATENTS = LatentSpec(channels=4, downscale=8, bucket_step=64, cache_suffix="_knots.npz", had_keys_without_size=False)


def build(options: KnotsOptions) -> Architecture:
    """Assemble the Knots model that the options name; nothing is loaded yet. Raises UserError naming the flag."""
    RECIPE.check(options)
    text = ByteText(options.text.max_bytes)
    return Architecture(
        name="knots",
        load=open_loader(options),
        text=text,
        codec=KlLatents(LATENTS, 0.18215),
        objective=build_ddpm(options.noise, options.loss, options.model.v_parameterization),
        predict=predict,
        view=view,
        preview=build_unet_preview(
            options.preview.sample_sampler,
            options.model.v_parameterization,
            options.noise.zero_terminal_snr,
            text,
            predict,
        ),
        metadata=RECIPE.describe(options),
        specs=list_specs(),
        ignores=RECIPE.ignores,
    )
