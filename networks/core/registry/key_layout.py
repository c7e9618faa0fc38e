"""Layout of a module's parameter keys in a file, and how its change is read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from library.checkpoints.adapter_names import FileNaming
from networks.core.changes.change import Change, ModuleTensors
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.targets.targets import TargetKind


@dataclass(frozen=True)
class KeyLayout:
    """Storage of one module's change in a file.

    `read` makes the change from a module's tensors, for a layer or, without one, for merging only. It raises ValueError
    if they do not fit together. It is None for kinds that are recognised and kept, but not computed.
    """

    name: str  # in reports
    words: str  # name in messages
    needs: tuple[str, ...]  # keys that are required; a module without them is incomplete or has another layout
    read: Callable[[ModuleTensors, nn.Module | None], Change] | None = None
    core: tuple[str, ...] = ()  # keys of a Tucker core
    may_have: tuple[str, ...] = (ALPHA, DORA_SCALE)
    rank_of: Callable[[ModuleTensors], int] | None = None  # None if there is no rank
    shape_of: Callable[[str, ModuleTensors], tuple[int, ...]] | None = None  # of the weight; gets the module's name too
    exact: tuple[str, ...] = (DORA_SCALE,)  # keys that are never rounded to 16 bits, such as magnitudes
    is_low_rank: bool = False  # the change is scale * up @ down with small factors
    ends: tuple[str, str] | None = None  # keys of the factors at the input and output, for norms in reports
    scaled: str = ""  # key that takes the scale in namings without alpha; "" if there is none
    namings: frozenset[FileNaming] = frozenset(("kohya",))  # namings whose programs read it
    together: str = ""  # name of `needs` in messages
    own_form: Callable[[ModuleTensors], dict[str, Tensor]] | None = None  # converts other programs' tensors to ours
    fault: Callable[[str, ModuleTensors, Mapping[str, str]], str | None] | None = (
        None  # (name, tensors, whole keys) -> what is wrong
    )
    alpha_is_strength: bool = True  # if False, alpha is not a scale, and is never left out or added
    switches: tuple[str, ...] = ()  # keys of integer tensors
    network_module: str = ""  # the network module that trains it further
    is_whole: bool = False  # no factor has a rank: alpha is taken to be the rank
    targets: frozenset[TargetKind] = frozenset(("plain", "conv"))  # kinds of target modules that it changes

    @property
    def has_alpha(self) -> bool:
        """True if alpha / rank is the strength of the change."""
        return self.rank_of is not None and ALPHA in self.may_have and self.alpha_is_strength

    @property
    def keys(self) -> frozenset[str]:
        """Every key that a module of this layout can have."""
        return frozenset((*self.needs, *self.core, *self.may_have))

    def alpha_of(self, tensors: ModuleTensors) -> float:
        """Return the recorded alpha, or the rank if none is recorded or alpha has no effect."""
        assert self.rank_of is not None
        return float(tensors[ALPHA]) if ALPHA in tensors and not self.is_whole else float(self.rank_of(tensors))

    def has_core(self, tensors: Collection[str]) -> bool:
        return any(key in tensors for key in self.core)
