"""The names of the layers of Knots in adapter files."""

from library.checkpoints.adapter_names import BaseNames, ModuleNames

NUM_BLOCKS = 8
LAYERS = ("mix", "lift")


def denoiser_module(path: str) -> ModuleNames:
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=f"transformer.{path.replace('knots', 'transformer_knots')}",
    )


def text_module(path: str) -> ModuleNames:
    return ModuleNames(f"lora_te_{path}", f"text_encoders.bytes.{path}", f"text_encoder.{path}")


NAMES = BaseNames(
    "knots",
    (*(denoiser_module(f"knots.{n}.{layer}") for n in range(NUM_BLOCKS) for layer in LAYERS), text_module("project")),
)
