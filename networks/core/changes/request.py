"""The request that a kind of adapter answers: make the change of one target."""

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
    """The change of one module that a network is to have, new or in the form that it has in a file."""

    target: TargetModule
    rank: int
    alpha: float  # 0 stands for the rank
    arguments: NetworkArguments
    noise: NoiseLevels
    is_denoiser: bool  # captions are encoded once for all noise levels
    qkv_widths: tuple[int, ...] | None = None  # outputs of each projection, where the base model has several in one
    tensors: ModuleTensors | None = None  # of the file, whose values are loaded later; None for a new change
    source: str = ""  # the file, for messages
    has_core: bool = False
    is_decomposed: bool = False
    is_per_output: bool = False  # of magnitudes, where it is decomposed

    @property
    def layer(self) -> nn.Module:
        return self.target.module

    @property
    def split_widths(self) -> tuple[int, ...] | None:
        """The outputs of each projection that is adapted apart."""
        return self.qkv_widths if self.arguments.of(StructureArguments).split_qkv else None

    @property
    def drops(self) -> Dropout:
        return Dropout.of(self.arguments)

    @property
    def has_scalar(self) -> bool:
        return self.arguments.of(StructureArguments).use_scalar
