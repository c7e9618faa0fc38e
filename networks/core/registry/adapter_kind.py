"""Adapter kind: each kind is one file in networks/core/kinds that defines KIND."""

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
    """Network arguments of a feature that wraps the change of some kinds only: `init`, GGPO, T-LoRA."""

    switches: ClassVar[tuple[str, ...]]  # the arguments that enable it
    made_for: ClassVar[str]  # why other kinds do not support it
    excludes: ClassVar[Mapping[str, str]]  # network argument -> why it does not work with this feature

    @property
    def is_on(self) -> bool: ...

    @property
    def label(self) -> str:
        """The setting that enabled it, for messages."""
        ...


@dataclass(frozen=True)
class NoArguments:
    """Network arguments of a kind that has none."""


StartStep = Callable[[Sequence[Adapter], int, int], None]
"""(trained adapters, seed, step) -> None; called before each batch of optimizer step `step`."""


@dataclass(frozen=True)
class AdapterKind:
    """One kind of adapter: its layouts in files, its network arguments, and how a new one is made.

    `prepare` gets all adapters of a new network. It can log, warn and raise UserError, and it can return a function
    that is called before each batch of an optimizer step.
    """

    layouts: tuple[KeyLayout, ...] = ()  # layouts that it can train further, in addition to norms
    make: Callable[[ChangeRequest], Change] | None = None  # None if it cannot be trained
    network_module: str = ""  # the network module of the kind
    default_rank: int = 4
    arguments: type = NoArguments  # dataclass of the kind's network arguments
    merged_layouts: tuple[KeyLayout, ...] = ()  # layouts that are recognised and merged, but not trained further
    wrappers: tuple[type[Wrapper], ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)  # network argument -> why this kind does not support it
    presets: Mapping[str, str] = field(default_factory=dict)  # network arguments that it always sets
    # The rank, the alpha and the arguments in the terms of LoRA.
    resolve: Callable[[NetworkSettings], NetworkSettings] = lambda settings: settings
    # What is adapted of a part of the base model, and whether it is the denoiser; None for nothing.
    narrow: Callable[[Part, bool, NetworkArguments], Part | None] = lambda part, is_denoiser, arguments: part
    prepare: Callable[[Sequence[Adapter], NetworkArguments], StartStep | None] = lambda adapters, arguments: None
