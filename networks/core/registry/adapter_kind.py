"""A kind of adapter: each is one file in networks/core/kinds that defines KIND."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from networks.core.arguments.network_arguments import NetworkArguments, NetworkSettings
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Change
from networks.core.changes.request import ChangeRequest
from networks.core.registry.key_layout import KeyLayout
from networks.core.targets.targets import Part


class Wrapper(Protocol):
    """The network arguments of what wraps the change of some kinds only: a start, GGPO, T-LoRA."""

    switches: ClassVar[tuple[str, ...]]  # the arguments that switch it on
    made_for: ClassVar[str]  # why other kinds do not have it
    excludes: ClassVar[Mapping[str, str]]  # network argument -> why the two do not work together

    @property
    def is_on(self) -> bool: ...

    @property
    def label(self) -> str:
        """The setting that a user gave to have it."""
        ...


@dataclass(frozen=True)
class NoArguments:
    """A kind without network arguments of its own."""


StartStep = Callable[[Sequence[Adapter], int, int], None]
"""(the adapters that are trained, seed, step) -> None; called before each batch of optimizer step `step`."""


@dataclass(frozen=True)
class AdapterKind:
    """How adapters of one kind lie in files, which network arguments they have, and how a new one is made.

    `prepare` looks at all adapters of a network once they are made: it logs, warns, raises UserError, and returns what
    is to happen before each optimizer step.
    """

    layouts: tuple[KeyLayout, ...] = ()  # what files may hold that it trains further, beside norms
    make: Callable[[ChangeRequest], Change] | None = None  # unset where there is nothing to train
    network_module: str = ""  # the module that registers it
    default_rank: int = 4
    arguments: type = NoArguments  # a dataclass of its own network arguments
    merged_layouts: tuple[KeyLayout, ...] = ()  # what is recognised and merged, but not trained further
    wrappers: tuple[type[Wrapper], ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)  # network argument -> why it does not work with this kind
    presets: Mapping[str, str] = field(default_factory=dict)  # network arguments that it always has
    # The rank, the alpha and the arguments in the terms of LoRA.
    resolve: Callable[[NetworkSettings], NetworkSettings] = lambda settings: settings
    # What is adapted of a part of the base model, and whether it is the denoiser; None for nothing.
    narrow: Callable[[Part, bool, NetworkArguments], Part | None] = lambda part, is_denoiser, arguments: part
    prepare: Callable[[Sequence[Adapter], NetworkArguments], StartStep | None] = lambda adapters, arguments: None
