"""The optimizer."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The optimizer."""

    optimizer_type: str = option(
        "",
        help="Optimizer by name, such as AdamW8bit, Lion, Prodigy or Adafactor, or by dotted path of a class. Empty is"
        " AdamW.",
    )
    use_8bit_adam: bool = option(False, help="Old way to say --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = option(False, help="Old way to say --optimizer_type Lion.")
    learning_rate: float = option(
        2e-06,
        at_least=0,
        help="Learning rate, where --unet_lr and --text_encoder_lr do not say otherwise. 1e-4 is usual for LoRA.",
    )
    max_grad_norm: float = option(
        1.0,
        at_least=0,
        help="Longest gradient over all trained weights; longer ones are shortened to it. 0 never shortens.",
    )
    optimizer_args: list[str] | None = option(
        None,
        help="Further settings of the optimizer as key=value, separated by spaces, such as weight_decay=0.01 "
        "betas=0.9,0.99.",
        nargs="*",
    )
    fused_backward_pass: bool = option(False, help="Update weights inside the backward pass, with Adafactor only.")
