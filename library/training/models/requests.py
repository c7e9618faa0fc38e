"""A run before any model is loaded: what its stages need besides the options, resolved once."""

from dataclasses import dataclass, field

from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.models.text_caching import TextPlan
from library.training.models.weight_formats import BaseFormats
from library.training.reporting.event_stream import Events
from library.training.saving.names import Names
from library.training.saving.state import StateManifest
from networks.core.protocol import NetworkModule, open_network_module


@dataclass(frozen=True)
class RequestedRun:
    """A run to train, or only to count or measure."""

    options: TrainOptions
    module: NetworkModule
    arch: Architecture
    text: TextPlan
    formats: BaseFormats
    names: Names | None = None  # of the files that it writes; None if it writes none
    seed: int = 0  # for initialisation, noise and dropout
    state: StateManifest | None = None  # to resume from
    events: Events = field(default_factory=Events)

    @classmethod
    def resolve(cls, options: TrainOptions, arch: Architecture) -> "RequestedRun":
        """Request a run that writes nothing, for a command that only counts or measures it."""
        module = open_network_module(options.network.network_module or "")
        text = TextPlan.resolve(options.network, arch.text_cache)
        return cls(options, module, arch, text, BaseFormats.load(options.precision))
