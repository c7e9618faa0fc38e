"""A run before any model is loaded: what its stages need besides the options, resolved once."""

from collections.abc import Iterable, Sequence
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
class AdapterRequest:
    """An adapter to train; several may share the base model and the batches."""

    options: TrainOptions  # of this adapter alone
    module: NetworkModule
    names: Names | None = None  # of the files that it writes; None if it writes none
    seed: int = 0  # for initialisation, noise and dropout
    state: StateManifest | None = None  # to resume from
    events: Events = field(default_factory=Events)
    label: str = ""  # its name in a sweep


@dataclass(frozen=True)
class RequestedRun:
    """The adapters that share a step, and what they share."""

    options: TrainOptions  # of the base model, the data and the loop
    adapters: Sequence[AdapterRequest]
    arch: Architecture
    text: TextPlan
    formats: BaseFormats

    @classmethod
    def resolve(cls, adapters: Iterable[TrainOptions], arch: Architecture) -> "RequestedRun":
        """Request adapters that write nothing, for a command that only counts or measures a run."""
        requests = [AdapterRequest(o, open_network_module(o.network.network_module or "")) for o in adapters]
        options = requests[0].options
        text = TextPlan.resolve(options.network, arch.text_cache)
        return cls(options, requests, arch, text, BaseFormats.load(options.precision))
