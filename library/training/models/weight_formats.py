"""The weight formats of frozen models while reading, counting and training."""

from dataclasses import dataclass

from torch import nn

from library.environment.packages import import_needed
from library.memory.codecs.codec import AS_IN_FILE, AsInFile, Codec
from library.memory.codecs.weight_format import WeightFormat, load_format
from library.memory.frozen import freeze_layers, frozen_layers, layers_in_blocks
from library.options.machine.memory import PrecisionOptions


@dataclass(frozen=True)
class BaseFormats:
    """The weight formats of the frozen models; None keeps --mixed_precision or the format of the file."""

    denoiser: WeightFormat | None
    text_encoders: WeightFormat | None

    @classmethod
    def load(cls, precision: PrecisionOptions) -> "BaseFormats":
        names = (precision.denoiser_format, precision.text_encoder_format)
        return cls(*(None if name is None else load_format(name) for name in names))


def check_format(name: str | None) -> None:
    """Raise UserError if a package that the weight format needs is missing or broken."""
    package = None if name is None else load_format(name).required_package
    if package is not None:
        import_needed(package, "--base_format", str(name), ", or use --base_format int8")


def format_while_reading(
    weight_format: WeightFormat | None, merges: bool, merges_afterwards: bool = False
) -> Codec | AsInFile | None:
    """Return the codec for the denoiser's weights while they are read; None keeps the compute dtype.

    Merging needs decoded weights: 8-bit weights of the file are decoded, and with `merges_afterwards`, which
    third-party network modules need, nothing is encoded until everything is read.
    """
    if merges and merges_afterwards:
        return None
    if weight_format is not None:
        return weight_format.codec
    return None if merges else AS_IN_FILE


def store_in_format(codec: Codec, *models: nn.Module) -> int:
    """Convert the blocks' remaining weights to a weight format. Return the number of layers that have it, including
    those that were converted while they were read."""
    num_layers = 0
    for model in models:
        freeze_layers(codec, layers_in_blocks(model).values())
        num_layers += sum(layer.decoder is codec for layer in frozen_layers(model))
    return num_layers
