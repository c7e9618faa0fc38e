"""Number formats of weights and arithmetic."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class PrecisionOptions(Options):
    """Number formats of weights and arithmetic."""

    mixed_precision: str = option(
        "no",
        help="Number format of arithmetic and of the frozen models: no is 32 bits, bf16 needs a recent card, fp16 a "
        "scaler for small gradients.",
        choices=("no", "fp16", "bf16"),
    )
    full_fp16: bool = option(
        False,
        help="Keep the adapter and its gradients in fp16 too. Needs --mixed_precision fp16; saves memory and loses "
        "accuracy.",
    )
    full_bf16: bool = option(
        False,
        help="Keep the adapter and its gradients in bf16 too. Needs --mixed_precision bf16; saves memory and loses "
        "accuracy.",
    )
    fp8_base: bool = option(False, help="Keep the frozen base model in 8 bits. Needs --mixed_precision fp16 or bf16.")
    fp8_base_unet: bool = option(
        False,
        help="Keep the frozen denoiser in 8 bits and the text encoders in the format of --mixed_precision.",
    )

    @property
    def shrinks_denoiser(self) -> bool:
        """Whether the denoiser is to be kept in 8 bits."""
        return self.fp8_base or self.fp8_base_unet
