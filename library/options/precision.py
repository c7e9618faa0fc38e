"""Number formats of weights and arithmetic."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class PrecisionOptions(Options):
    """Number formats of weights and arithmetic."""

    mixed_precision: str = option("no", help="", choices=("no", "fp16", "bf16"))
    full_fp16: bool = option(False, help="")
    full_bf16: bool = option(False, help="")
    fp8_base: bool = option(False, help="")
    fp8_base_unet: bool = option(False, help="")
