"""A kind of adapter as files have it, and the door through which it is trained."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from library.checkpoints.adapter_names import FileNaming
from networks.core.arguments.parsing import NetworkArguments
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Change, Delta, Leaves, MakeDelta
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE

MakeChange = Callable[..., Change]
"""(the layer, its rank, dropouts, whether a strength is trained, the tensors of a file or None) -> its change."""

Resolve = Callable[[int | None, Any, int], tuple[int, Any]]
"""(--network_dim, network arguments, the default rank) -> the rank and the arguments in the core's own terms."""

MakeFresh = Callable[[nn.Module, str, int, float, Any, tuple[int, ...] | None], Change]
"""(the layer, its path, rank, alpha, dropouts, the outputs of each projection of a fused layer) -> a new change."""

MakeSplit = Callable[[nn.Linear, int, tuple[int, ...]], Delta]
"""(a fused layer, the rank of each projection, the outputs of each) -> the change of its weight."""


class Member(Protocol):
    """One adapter of a network, as the hooks of a kind see it."""

    @property
    def adapter(self) -> Adapter: ...


class Network(Protocol):
    """All adapters of a run, as the hooks of a kind see them."""

    arguments: NetworkArguments

    @property
    def members(self) -> Sequence[Member]: ...


@dataclass(frozen=True)
class Kind:
    """How the change of one module lies in a file.

    `read` makes the change of a module's tensors, for a layer or, without one, for its weight alone; it raises
    ValueError where they do not fit together. None for kinds that are recognised and kept, but not computed.
    """

    name: str  # in reports
    words: str  # in a user's words
    needs: tuple[str, ...]  # the leaves without which a module is incomplete, or is of another kind
    read: Callable[[Leaves, nn.Module | None], Change] | None = None
    core: tuple[str, ...] = ()  # leaves of a Tucker core
    may_have: tuple[str, ...] = (ALPHA, DORA_SCALE)
    rank_of: Callable[[Leaves], int] | None = None  # None where there is no rank
    shape_of: Callable[[str, Leaves], tuple[int, ...]] | None = None  # of the weight, from the module's name too
    exact: tuple[str, ...] = (DORA_SCALE,)  # leaves that stand near what they multiply, and are kept in float32
    is_low_rank: bool = False  # the change is scale * up @ down, and cheap to give as such
    ends: tuple[str, str] | None = None  # the leaves next to the input and to the output, whose norms reports show
    scaled: str = ""  # the leaf that takes the scale where a naming has no alpha, "" where there is none
    namings: frozenset[FileNaming] = frozenset(("kohya",))  # those whose programs read it
    together: str = ""  # how `needs` are called in a sentence
    own_form: Callable[[Leaves], dict[str, Tensor]] | None = None  # leaves of other programs as they are here
    fault: Callable[[str, Leaves, Mapping[str, str]], str | None] | None = None  # (name, leaves, keys) -> what is wrong
    alpha_is_strength: bool = True  # else it is another number of the change, and never left out or made up
    switches: tuple[str, ...] = ()  # leaves that are 0 or 1, and whole numbers therefore
    door: str = ""  # the --network_module that trains it further
    is_whole: bool = False  # no factor has a rank: alpha counts as the rank, whatever is recorded

    @property
    def has_alpha(self) -> bool:
        """Whether alpha / rank is the strength of the change."""
        return self.rank_of is not None and ALPHA in self.may_have and self.alpha_is_strength

    @property
    def leaves(self) -> frozenset[str]:
        """Every leaf that a module of this kind can have."""
        return frozenset((*self.needs, *self.core, *self.may_have))

    def alpha_of(self, leaves: Leaves) -> float:
        """As recorded; the rank where nothing is, or where alpha does not count."""
        assert self.rank_of is not None
        return float(leaves[ALPHA]) if ALPHA in leaves and not self.is_whole else float(self.rank_of(leaves))

    def has_core(self, leaves: Collection[str]) -> bool:
        return any(leaf in leaves for leaf in self.core)


FOR_FEW: Mapping[str, str] = {
    "init": "it says where the two factors of a LoRA start, and both of them train",
    **dict.fromkeys(
        ("ggpo_sigma", "ggpo_beta"), "its noise is measured by the two factors of a LoRA, and both of them train"
    ),
    "tlora": "it counts the ranks between the two factors of a LoRA",
}
"""Network arguments that only doors which list them have, and why others have not."""


@dataclass(frozen=True)
class Door:
    """What a --network_module makes of the arguments, for one kind of adapter."""

    make_delta: MakeDelta | None = None  # of what adds to the weight
    make_core: MakeDelta | None = None  # the same with use_tucker, for kernels larger than 1x1
    make_change: MakeChange | None = None  # of what does something else
    make_fresh: MakeFresh | None = None  # the same where no file says what it is like, and that takes more
    make_split: MakeSplit | None = None  # with split_qkv
    kinds: tuple[Kind, ...] = ()  # what files may hold that it trains further, beside norms
    check: Callable[[Any], None] | None = None  # tells what comes of the settings, or raises UserError
    start_step: Callable[[Any, int, int], None] | None = None  # called before each batch of an optimizer step
    like: Callable[[nn.Module, Leaves], Delta] | None = None  # as in a file, where rank and core do not tell all
    default_rank: int = 4
    arguments: tuple[str, ...] = ()  # network arguments that few doors have
    resolve: Resolve | None = None  # where arguments mean something else than for other kinds
    resolve_alpha: Callable[[float, Any], tuple[float, Any]] | None = None  # the same of --network_alpha
    narrow: Callable[[Any, Any], Any] | None = None  # (a part of the model, arguments) -> where new adapters go there
    denoiser_only: bool = False  # text encoders get no new adapters
    with_arguments: Callable[[Any], "Door"] | None = None  # the same door for these arguments
    refuses: Mapping[str, str] = field(default_factory=dict)  # network argument -> why it does not work with this kind
    takes: frozenset[str] = frozenset()  # of the arguments that few kinds have (`FOR_FEW`), those that this one has
    is_tlora: bool = False  # as if `tlora` were given
