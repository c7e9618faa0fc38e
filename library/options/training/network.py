"""The adapter and its learning rates."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import PROBABILITY, number, whole


@dataclass(frozen=True)
class NetworkOptions(Options):
    """The adapter and its learning rates."""

    network_module: str | None = option(None, usual=True, short_name="")
    """Python module that makes the adapter, such as networks.lora or lycoris.kohya."""
    network_dim: int | None = option(None, usual=True, kind=whole(1), unless="dim_from_weights", short_name="dim")
    """Rank of the adapter: higher learns more detail and makes a larger file. Unset leaves it to the module, 4 for
    networks.lora."""
    # The default does not follow the rank, as in sd-scripts: a LoRA of rank 32 without --network_alpha acts at 1/32.
    network_alpha: float = option(1, usual=True, kind=number(0), unless="dim_from_weights", short_name="alpha")
    """Strength of the adapter as alpha divided by rank. Often half the rank or equal to it; 0 means equal."""
    network_dropout: float | None = option(None, usual=True, kind=PROBABILITY, short_name="dropout")
    """Probability of dropping each value inside the adapter during training, below 1. Unset drops none."""
    network_args: list[str] | None = option(None, usual=True, nargs="*")
    """Further settings of the network module as key=value, separated by spaces, such as conv_dim=4 conv_alpha=1."""
    network_weights: str | None = option(
        None, path="file or folder", usual=True, kept_in_state=True, short_name="from_"
    )
    """Adapter file to start training from. Unset starts from scratch."""
    dim_from_weights: bool = option(
        False,
        requires="network_weights",
        kept_in_state=True,  # the state is refused by an adapter of other ranks or forms, and has the alphas
        help="Take rank and alpha from the file of --network_weights instead of --network_dim and --network_alpha.",
    )
    network_train_unet_only: bool = option(
        False, usual=True, excludes={"network_train_text_encoder_only": "together they train nothing"}
    )
    """Train the denoiser only and leave the text encoder as it is."""
    network_train_text_encoder_only: bool = option(
        False, refused_by_leco="only the denoiser is trained by prompts alone; leave it out"
    )
    """Train the text encoder only and leave the denoiser as it is."""
    base_weights: list[str] | None = option(None, path="file or folder", nargs="*")
    """Adapter files to merge into the base model before training. They are not part of the saved file."""
    base_weights_multiplier: list[float] | None = option(None, needs="base_weights", nargs="*")
    """Strength of each file of --base_weights, in their order. Missing ones are 1.0."""
    training_adapter: str | None = option(None, path="file")
    """Adapter that acts in training beside the trained one, FILE or FILE:STRENGTH, such as a training adapter for a
    distilled model. It is not part of the saved file, and previews are drawn without it."""
    scale_weight_norms: float | None = option(None, short_name="maxnorm")
    """Maximum norm of each module's weight change; larger ones are scaled down after every step. Unset sets no
    limit."""
    unet_lr: float | None = option(
        None,
        on_resume="new rate",
        usual=True,
        kind=number(0),
        unless="network_train_text_encoder_only",
        short_name="unetlr",
    )
    """Learning rate of the denoiser's adapter. Unset uses --learning_rate."""
    text_encoder_lr: list[float] | None = option(
        None,
        on_resume="new rate",
        usual=True,
        kind=number(0),
        unless="network_train_unet_only",
        short_name="telr",
        nargs="*",
    )
    """Learning rate of the text encoder's adapter, several values for several encoders. Unset uses --learning_rate."""

    @property
    def has_training_adapter(self) -> bool:
        """Return True if a distilled model is trained with an adapter that keeps it distilled, merged or beside."""
        return bool(self.base_weights or self.training_adapter)


def train_denoiser_alone(network: NetworkOptions) -> dict[str, bool]:
    """Return the value with which only the denoiser is trained, for base models whose text encoders have no adapters. A
    request to train only those is left to be refused with a reason."""
    return {"network_train_unet_only": not network.network_train_text_encoder_only}
