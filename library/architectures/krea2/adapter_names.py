"""The names of the layers of Krea 2 in adapter files.

Module paths are those of the original checkpoint. ai-toolkit and the model's authors write them in the generic naming,
musubi-tuner in kohya's; SimpleTuner and OneTrainer write diffusers' paths.
"""

from library.architectures.krea2.checkpoint_keys import diffusers_path, linear_paths
from library.checkpoints.adapter_names import BaseNames, ModuleNames


def denoiser_module(path: str) -> ModuleNames:
    other = diffusers_path(path)
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=f"transformer.{other}",
        aliases=(f"diffusion_model.{other}", f"lora_unet_{other.replace('.', '_')}"),
    )


NAMES = BaseNames("krea2", tuple(map(denoiser_module, linear_paths())))
