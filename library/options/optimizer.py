"""The optimizer."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The optimizer."""

    optimizer_type: str = option("", help="")
    use_8bit_adam: bool = option(False, help="")
    use_lion_optimizer: bool = option(False, help="")
    learning_rate: float = option(2e-06, help="")
    max_grad_norm: float = option(1.0, help="")
    optimizer_args: list[str] | None = option(None, help="", nargs="*")
    fused_backward_pass: bool = option(False, help="")
