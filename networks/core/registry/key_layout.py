"""The parameter keys of a module in a file, and how to read the change that they make."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from library.checkpoints.adapter_names import FileNaming
from networks.core.changes.change import Change, ModuleTensors
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.targets.targets import TargetKind


@dataclass(frozen=True)
class KeyLayout:
    """How the change of one module lies in a file.

    `read` makes the change of a module's tensors, for a layer or, without one, for its weight alone; it raises
    ValueError where they do not fit together. None for kinds that are recognised and kept, but not computed.
    """

    name: str  # in reports
    words: str  # in a user's words
    needs: tuple[str, ...]  # the keys without which a module is incomplete, or is of another layout
    read: Callable[[ModuleTensors, nn.Module | None], Change] | None = None
    core: tuple[str, ...] = ()  # keys of a Tucker core
    may_have: tuple[str, ...] = (ALPHA, DORA_SCALE)
    rank_of: Callable[[ModuleTensors], int] | None = None  # None where there is no rank
    shape_of: Callable[[str, ModuleTensors], tuple[int, ...]] | None = None  # of the weight, from the module's name too
    exact: tuple[str, ...] = (DORA_SCALE,)  # keys of what stands near what they multiply, and are kept in float32
    is_low_rank: bool = False  # the change is scale * up @ down, and cheap to give as such
    ends: tuple[str, str] | None = None  # the keys next to the input and to the output, whose norms reports show
    scaled: str = ""  # the key that takes the scale where a naming has no alpha, "" where there is none
    namings: frozenset[FileNaming] = frozenset(("kohya",))  # those whose programs read it
    together: str = ""  # how `needs` are called in a sentence
    own_form: Callable[[ModuleTensors], dict[str, Tensor]] | None = None  # tensors of other programs as they are here
    fault: Callable[[str, ModuleTensors, Mapping[str, str]], str | None] | None = (
        None  # (name, tensors, whole keys) -> what is wrong
    )
    alpha_is_strength: bool = True  # else it is another number of the change, and never left out or made up
    switches: tuple[str, ...] = ()  # keys of whole numbers
    network_module: str = ""  # the module that trains it further
    is_whole: bool = False  # no factor has a rank: alpha counts as the rank, whatever is recorded
    targets: frozenset[TargetKind] = frozenset(("plain", "conv"))  # the sorts of modules that it changes

    @property
    def has_alpha(self) -> bool:
        """True if alpha / rank is the strength of the change."""
        return self.rank_of is not None and ALPHA in self.may_have and self.alpha_is_strength

    @property
    def keys(self) -> frozenset[str]:
        """Every key that a module of this layout can have."""
        return frozenset((*self.needs, *self.core, *self.may_have))

    def alpha_of(self, tensors: ModuleTensors) -> float:
        """Return the alpha that is recorded; the rank where none is, or where alpha does not count."""
        assert self.rank_of is not None
        return float(tensors[ALPHA]) if ALPHA in tensors and not self.is_whole else float(self.rank_of(tensors))

    def has_core(self, tensors: Collection[str]) -> bool:
        return any(key in tensors for key in self.core)
