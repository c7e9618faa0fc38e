"""The adapter and its learning rates."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class NetworkOptions(Options):
    """The adapter and its learning rates."""

    network_module: str | None = option(None, help="")
    network_dim: int | None = option(None, help="")
    network_alpha: float = option(1, help="")
    network_dropout: float | None = option(None, help="")
    network_args: list[str] | None = option(None, help="", nargs="*")
    network_weights: str | None = option(None, help="")
    dim_from_weights: bool = option(False, help="")
    network_train_unet_only: bool = option(False, help="")
    network_train_text_encoder_only: bool = option(False, help="")
    base_weights: list[str] | None = option(None, help="", nargs="*")
    base_weights_multiplier: list[float] | None = option(None, help="", nargs="*")
    scale_weight_norms: float | None = option(None, help="")
    unet_lr: float | None = option(None, help="")
    text_encoder_lr: list[float] | None = option(None, help="", nargs="*")
