"""The layers of Knots that adapters change: what they attach to, and the names that files have for it."""

from collections.abc import Sequence

from torch import nn

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from networks.core.targets.targets import AdapterTargets, Part

NUM_BLOCKS = 2
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

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("Knot",)),
    text_encoders=(Part("lora_te", blocks=("ByteEncoder",)),),
    ranks={"lift_dim": r"\.lift$"},
    block_choices={"train_knot_indices": r"^knots\.(\d+)\."},
    names=NAMES,
    elsewhere=list_network_arguments,
)


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """(text encoder, denoiser) for `create_network` and `apply_to`; the paths of both are those of files."""
    return text_encoders[0] if text_encoders else [], denoiser
