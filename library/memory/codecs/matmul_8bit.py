"""Products with the 8-bit codes of a frozen weight, without decoding it. Activations are rounded to 8 bits too.

Each token has a scale that maps its largest value to the largest 8-bit number. The scales of tokens and of the weight's
rows are applied after the product. If the sum runs over rows, their scales are multiplied into the gradient before it
is rounded. For a few tokens, such as the one that modulates a block for the whole image, the rounding remainders are
multiplied too, as additional tokens: the kernels take as long for 17 tokens as for one.

Letters: T tokens, O outputs, I inputs; K the summed axis of a product, N its other axis.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

FP8 = torch.float8_e4m3fn
MULTIPLES = {torch.int8: 8, FP8: 16, torch.float8_e5m2: 16}
"""Code dtypes that can be multiplied, each with the number of which both sizes of a weight must be multiples on
GPUs."""

FEWEST_ROWS = 17  # minimum that torch._int_mm accepts on GPUs
MOST_TWICE = FEWEST_ROWS // 2  # largest number of tokens with multiplied rounding remainders


@dataclass(frozen=True)
class Codes:
    """A weight stored as `rotation(codes * scales)`; `rotation` is its own inverse and its own transpose."""

    codes_OI: Tensor
    scales: Tensor  # () or (O, 1)
    rotation: Callable[[Tensor], Tensor] | None = None

    @property
    def can_be_multiplied(self) -> bool:
        """True if the kernels accept codes of this dtype and shape."""
        multiple = MULTIPLES.get(self.codes_OI.dtype)
        return (
            multiple is not None and self.scales.ndim < 3 and not any(size % multiple for size in self.codes_OI.shape)
        )

    @property
    def scales_of_outputs(self) -> Tensor:
        """The scales as () or (1, O), float32."""
        return self.scales.float() if self.scales.ndim == 0 else self.scales.float().reshape(1, -1)


def output(x: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
    """Multiply x (..., I) by the weight's transpose; return (..., O) in the dtype of x."""
    x_TI = x.reshape(-1, x.shape[-1])
    rotated_TI = x_TI if weight.rotation is None else weight.rotation(x_TI)
    y_TO = products_of_rounded(rotated_TI, weight.codes_OI.dtype, weight.codes_OI.t(), x.dtype)
    y_TO *= weight.scales_of_outputs
    if bias is not None:
        y_TO += bias
    return y_TO.to(x.dtype).reshape(*x.shape[:-1], -1)


def input_gradient(gradient: Tensor, weight: Codes) -> Tensor:
    """Multiply the output's gradient (..., O) by the weight; return (..., I) in the dtype of the gradient."""
    scaled_TO = gradient.reshape(-1, gradient.shape[-1]) * weight.scales_of_outputs
    codes_OI = columns_first(weight.codes_OI) if gradient.device.type == "cuda" else weight.codes_OI
    dx_TI = products_of_rounded(scaled_TO, weight.codes_OI.dtype, codes_OI, gradient.dtype).to(gradient.dtype)
    dx_TI = dx_TI if weight.rotation is None else weight.rotation(dx_TI)
    return dx_TI.reshape(*gradient.shape[:-1], -1)


def products_of_rounded(x_TK: Tensor, code_dtype: torch.dtype, codes_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply x, rounded to 8 bits, by codes of dtype `code_dtype`. Return (T, N) in float32.

    Up to MOST_TWICE tokens are rounded to about 16 bits, as two 8-bit parts.
    """
    rounded_TK, factors_T1 = round_tokens(x_TK, code_dtype)
    # Nothing averages out the rounding of a token that modulates a whole image. Rounded once, its product is off by
    # 3.4 % in int8 and 1.0 % in fp8; with the remainders by 0.012 % and 0.06 %.
    if len(x_TK) > MOST_TWICE:
        return product(rounded_TK, codes_KN, dtype) * factors_T1
    remainders_TK, remainder_factors_T1 = round_tokens(x_TK / factors_T1 - rounded_TK.float(), code_dtype)
    large_TN, small_TN = product(torch.cat([rounded_TK, remainders_TK]), codes_KN, dtype).chunk(2)
    return (large_TN + small_TN * remainder_factors_T1) * factors_T1


def round_tokens(x_TK: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each token to 8 bits. Return the numbers (T, K) and the tokens' scales (T, 1) in float32."""
    # For e5m2 codes the activations are e4m3: torch requires one side to be, and with a scale per token its smaller
    # range is enough.
    # Constants defined outside of functions become inputs of the compiled graph, which torch.compile loses in autograd
    # passes.
    rounded_dtype = torch.int8 if code_dtype == torch.int8 else FP8
    largest_T1 = torch.linalg.vector_norm(x_TK, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    largest = 127.0 if rounded_dtype == torch.int8 else 448.0
    factors_T1 = (largest_T1 / largest).clamp(min=torch.finfo(torch.float32).tiny)  # avoids 0 / 0 for all-zero tokens
    scaled_TK = x_TK / factors_T1
    return (scaled_TK.round_() if rounded_dtype == torch.int8 else scaled_TK).to(rounded_dtype), factors_T1


def with_fewest_rows(a_TK: Tensor) -> Tensor:
    """Return the matrix, with rows of zeros if it has fewer than `torch._int_mm` accepts."""
    num_rows = max(FEWEST_ROWS, len(a_TK))
    if torch.compiler.is_compiling():
        # A branch, also one inside of `pad`, would compile a second graph for short captions.
        padded_RK = a_TK.new_zeros(num_rows, a_TK.shape[1])
        padded_RK[: len(a_TK)] = a_TK
        return padded_RK
    return a_TK if num_rows == len(a_TK) else pad(a_TK, (0, 0, 0, num_rows - len(a_TK)))


def product(a_TK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product (T, N).

    It is int32 for int8. For fp8 it is bfloat16 if `dtype` is, else float32, because float16 would overflow.
    """
    if a_TK.dtype == torch.int8:
        return torch._int_mm(with_fewest_rows(a_TK), b_KN)[: len(a_TK)]
    # The scales of tokens and rows are applied after the product.
    one = torch.ones((), device=a_TK.device)
    out_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return torch._scaled_mm(a_TK, b_KN, one, one, out_dtype=out_dtype)


def columns_first(codes_KN: Tensor) -> Tensor:
    """Lay the codes out column-major, as GPUs require for the second factor."""
    return codes_KN.t().contiguous().t()
