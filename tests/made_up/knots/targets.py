"""The layers of Knots that adapters target, and the models as network modules see them."""

from collections.abc import Sequence

from torch import nn

from library.architectures.knots.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Part

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
