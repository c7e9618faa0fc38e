"""The layers of Knots: their names in adapter files, what adapters target, and the models as network modules see them.

diffusers has no model with these layers, so its naming means the generic one.
"""

from collections.abc import Sequence

from torch import nn

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from networks.core.targets.targets import AdapterTargets, Part

NUM_BLOCKS = 8
LAYERS = ("mix", "lift")


def denoiser_module(path: str) -> ModuleNames:
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=f"diffusion_model.{path}",
    )


def text_module(path: str) -> ModuleNames:
    return ModuleNames(f"lora_te_{path}", f"text_encoders.bytes.{path}", f"text_encoder.{path}")


NAMES = BaseNames(
    "knots",
    (*(denoiser_module(f"knots.{n}.{layer}") for n in range(NUM_BLOCKS) for layer in LAYERS), text_module("project")),
)
TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("Knot",)),
    text_encoders=(Part("lora_te", blocks=("ByteEncoder",)),),
    ranks={"lift_dim": r"\.lift$"},
    block_choices={"train_knot_indices": r"^knots\.(\d+)\."},
    names=NAMES,
    elsewhere=list_network_arguments,
)


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """Return (text encoder, denoiser) for `create_network` and `apply_to`, with the module paths of adapter files."""
    return text_encoders[0] if text_encoders else [], denoiser
