"""Weight format nf4: bitsandbytes' 4-bit NF4 (QLoRA, arXiv:2305.14314)."""

from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from library.memory.codecs.chunks import encode_in_chunks
from library.memory.codecs.codec import Parts
from library.memory.codecs.weight_format import WeightFormat

PACKAGE = "bitsandbytes"
GROUP = 64  # values that share a scale
FACTOR_GROUP = 256  # scales that share a second-level scale, if they are quantised too


@dataclass(frozen=True)
class Nf4:
    """Two codes per byte in `codes`, and a scale for every 64 values in `absmax`: 4.5 bits per value.

    With `is_double` the scales are stored as 8-bit codes, with `absmax_scales` for every 256 of them and their mean in
    `absmax_mean`: 4.13 bits per value.
    """

    is_double: bool = False

    def encode(self, weight: Tensor) -> Parts:
        parts = encode_in_chunks(weight, encode_rows)
        if not self.is_double:
            return parts
        # As bitsandbytes does: the 8-bit code is finest around 0, but scales are positive.
        mean = parts["absmax"].mean()
        absmax, state = functional().quantize_blockwise(parts["absmax"] - mean, blocksize=FACTOR_GROUP)
        return {
            "codes": parts["codes"],
            "absmax": absmax,
            "absmax_scales": state.absmax,
            "absmax_mean": mean.reshape(1),
        }

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        device = parts["codes"].device
        state = functional().QuantState(
            absmax=self.factors(parts),
            # The weight is decoded as one row: bitsandbytes 0.50 uses wrong scales on CPUs if 64 does not divide the
            # length of a row, and recompiles its code for odd lengths.
            shape=torch.Size((1, shape.numel())),
            code=table("nf4", device),
            blocksize=GROUP,
            quant_type="nf4",
            dtype=dtype,
        )
        weight: Tensor = functional().dequantize_4bit(parts["codes"], state)
        return weight.reshape(shape)

    def codes(self, parts: Parts) -> None:
        return None

    def factors(self, parts: Parts) -> Tensor:
        """Return the scale of every group of values, float32."""
        if not self.is_double:
            return parts["absmax"]
        state = functional().QuantState(
            absmax=parts["absmax_scales"],
            code=table("factors", parts["codes"].device),
            blocksize=FACTOR_GROUP,
            dtype=torch.float32,
        )
        factors: Tensor = functional().dequantize_blockwise(parts["absmax"], state)
        return (factors + parts["absmax_mean"]).float()


def encode_rows(weight_OI: Tensor) -> Parts:
    codes, state = functional().quantize_4bit(weight_OI.contiguous(), blocksize=GROUP, quant_type="nf4")
    return {"codes": codes, "absmax": state.absmax}


def functional() -> Any:
    """Import bitsandbytes here, so that only runs that use it need it."""
    import bitsandbytes.functional

    return bitsandbytes.functional


@cache
def table(kind: str, device: torch.device) -> Tensor:
    """Return the float32 numbers that the codes represent."""
    if kind == "nf4":
        nf4: Tensor = functional().get_4bit_type("nf4", device=device)
        return nf4
    dynamic: Tensor = functional().create_dynamic_map().to(device)
    return dynamic


def num_bytes(num_rows: int, num_columns: int, itemsize: int) -> int:
    """Return the bytes of a matrix: half a byte per value, and a float32 per 64 values."""
    num_values = num_rows * num_columns
    return ceil(num_values / 2) + 4 * ceil(num_values / GROUP)


FORMAT = WeightFormat(Nf4(), num_bytes, num_copies=1, slowdown=1.15, required_package=PACKAGE, error=0.1373)
