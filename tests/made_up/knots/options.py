"""Options specific to Knots."""

from dataclasses import dataclass

from library.options.base import Options, group, option
from library.options.kinds import whole
from library.options.train import TrainOptions


@dataclass(frozen=True)
class KnotsTextOptions(Options):
    """Options for the text features that the denoiser receives."""

    max_bytes: int = option(32, kind=whole(1), help="Bytes of a caption that reach the model; the rest is cut.")


@dataclass(frozen=True)
class KnotsOptions(TrainOptions):
    """All options of knots_train_network.py."""

    text: KnotsTextOptions = group(KnotsTextOptions)
