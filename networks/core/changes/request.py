"""Request to an adapter kind for the change of one target module."""

from dataclasses import dataclass

from torch import nn

from networks.core.arguments.common import StructureArguments
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.changes.change import ModuleTensors
from networks.core.changes.dropout import Dropout
from networks.core.changes.tlora import NoiseLevels
from networks.core.targets.targets import TargetModule


@dataclass(frozen=True)
class ChangeRequest:
    """Specification of the change of one module, either new or in the form of a file."""

    target: TargetModule
    rank: int
    alpha: float  # 0 means the rank
    arguments: NetworkArguments
    noise: NoiseLevels
    is_denoiser: bool  # T-LoRA acts here only: captions are encoded once for all noise levels
    qkv_widths: tuple[int, ...] | None = None  # outputs of each projection of a fused layer
    tensors: ModuleTensors | None = None  # the file's, loaded later; None for a new change
    source: str = ""  # the file, for messages
    has_core: bool = False
    is_decomposed: bool = False
    is_per_output: bool = False  # one DoRA magnitude per output instead of per input

    @property
    def layer(self) -> nn.Module:
        return self.target.module

    @property
    def split_widths(self) -> tuple[int, ...] | None:
        """The outputs of each projection if projections are adapted separately, else None."""
        return self.qkv_widths if self.arguments.of(StructureArguments).split_qkv else None

    @property
    def drops(self) -> Dropout:
        return Dropout.of(self.arguments)

    @property
    def has_scalar(self) -> bool:
        return self.arguments.of(StructureArguments).use_scalar
