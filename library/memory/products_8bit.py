"""Products with the 8-bit codes of a frozen weight, without decoding it. Activations are rounded to 8 bits too.

Each token has a scale that maps its largest value to the largest 8-bit number. The scales of tokens and of the weight's
rows are applied after the product. If the sum runs over rows, their scales are multiplied into the gradient before it
is rounded. GPUs round in two kernels and scale the product in one. For a few tokens, such as the one that modulates a
block for the whole image, the rounding remainders are multiplied too, as additional tokens: the kernels take as long
for 17 tokens as for one.

Letters: T tokens, O outputs, I inputs; K the summed axis of a product, N its other axis.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from library.memory.codecs.matmul_8bit import FP8, Codes
from library.memory.fused_kernels import Fused, fuses

FEWEST_ROWS = 17  # minimum that torch._int_mm accepts on GPUs
MOST_TWICE = FEWEST_ROWS // 2  # largest number of tokens with multiplied rounding remainders


def output(x: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
    """Multiply x (..., I) by the weight's transpose; return (..., O) in the dtype of x."""
    x_TI = x.reshape(-1, x.shape[-1])
    rotated_TI = x_TI if weight.rotation is None else weight.rotation(x_TI)
    codes_IO, scales = weight.codes_OI.t(), weight.scales_of_outputs
    y_TO = products_of_rounded(rotated_TI, None, weight.codes_OI.dtype, codes_IO, x.dtype, scales, bias)
    return y_TO.reshape(*x.shape[:-1], -1)


def input_gradient(gradient: Tensor, weight: Codes) -> Tensor:
    """Multiply the output's gradient (..., O) by the weight; return (..., I) in the dtype of the gradient."""
    gradient_TO, scales = gradient.reshape(-1, gradient.shape[-1]), weight.scales_of_outputs
    codes_OI = columns_first(weight.codes_OI) if gradient.device.type == "cuda" else weight.codes_OI
    dx_TI = products_of_rounded(gradient_TO, scales, weight.codes_OI.dtype, codes_OI, gradient.dtype)
    dx_TI = dx_TI if weight.rotation is None else weight.rotation(dx_TI)
    return dx_TI.reshape(*gradient.shape[:-1], -1)


def products_of_rounded(
    x_TK: Tensor,
    scales_K: Tensor | None,
    code_dtype: torch.dtype,
    codes_KN: Tensor,
    dtype: torch.dtype,
    scales_N: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> Tensor:
    """Multiply x times `scales_K`, rounded to 8 bits, by codes of dtype `code_dtype`. Return the product times
    `scales_N` plus the bias, (T, N) in `dtype`.

    Up to MOST_TWICE tokens are rounded to about 16 bits, as two 8-bit parts.
    """
    rounded_TK, factors_T1 = round_tokens(x_TK, scales_K, code_dtype)
    # Nothing averages out the rounding of a token that modulates a whole image. Rounded once, its product is off by
    # 3.4 % in int8 and 1.0 % in fp8; with the remainders by 0.012 % and 0.06 %.
    if len(x_TK) > MOST_TWICE:
        products_TN = product(rounded_TK, codes_KN, dtype)
    else:
        scaled_TK = x_TK if scales_K is None else x_TK * scales_K
        remainders_TK, finer_T1 = round_tokens(scaled_TK / factors_T1 - rounded_TK.float(), None, code_dtype)
        large_TN, small_TN = product(torch.cat([rounded_TK, remainders_TK]), codes_KN, dtype).chunk(2)
        products_TN = large_TN + small_TN * finer_T1
    return run(scaled_of, dtype, x_TK.device, products_TN, factors_T1, scales_N, bias_N)


def round_tokens(x_TK: Tensor, scales_K: Tensor | None, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each token, times `scales_K`, to 8 bits. Return the numbers (T, K) and the tokens' factors (T, 1) in
    float32."""
    # For e5m2 codes the activations are e4m3: torch requires one side to be, and with a scale per token its smaller
    # range is enough.
    rounded_dtype = torch.int8 if code_dtype == torch.int8 else FP8
    measure, device = measure_int8 if rounded_dtype == torch.int8 else measure_fp8, x_TK.device
    factors_T1 = run(measure, torch.float32, device, x_TK, scales_K)
    return run(rounded_of, rounded_dtype, device, x_TK, scales_K, factors_T1), factors_T1


def run(
    expression: Callable[..., Tensor], dtype: torch.dtype, device: torch.device, x: Tensor, *others: Tensor | None
) -> Tensor:
    """Evaluate an expression without gradients, in `dtype`: as one kernel, or as it is."""
    like = torch.empty(0, dtype=dtype, device=device)
    if torch.compiler.is_compiling():  # of the block, whose graph would depend on what is cached here
        return expression(like, x, *others).to(dtype)
    operation = fused(expression)
    is_fused = fuses(x) and fuses(like)
    out: Tensor = operation.run("value", like, x, *others) if is_fused else operation.value(like, x, *others)
    return out


@cache  # at the first product: other models have nothing to compile
def fused(expression: Callable[..., Tensor]) -> Fused:
    """Return the fused operation of an expression, which returns the dtype of its first input."""
    return Fused(expression, {}, widens=False)


# Constants defined outside of functions become inputs of the compiled graph, which torch.compile loses in autograd
# passes.
def measure_int8(like: Tensor, x_TK: Tensor, scales_K: Tensor | None) -> Tensor:
    return largest_of(x_TK, scales_K) / 127.0


def measure_fp8(like: Tensor, x_TK: Tensor, scales_K: Tensor | None) -> Tensor:
    return largest_of(x_TK, scales_K) / 448.0


def largest_of(x_TK: Tensor, scales_K: Tensor | None) -> Tensor:
    """Return each token's largest absolute value, (T, 1) in float32."""
    scaled_TK = x_TK if scales_K is None else x_TK * scales_K
    largest_T1: Tensor = torch.linalg.vector_norm(scaled_TK, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    return largest_T1.clamp(min=1e-35)  # avoids 0 / 0 for all-zero tokens


def rounded_of(like: Tensor, x_TK: Tensor, scales_K: Tensor | None, factors_T1: Tensor) -> Tensor:
    scaled_TK = (x_TK if scales_K is None else x_TK * scales_K) / factors_T1
    return scaled_TK.round_() if like.dtype == torch.int8 else scaled_TK


def scaled_of(
    like: Tensor, products_TN: Tensor, factors_T1: Tensor, scales_N: Tensor | None, bias_N: Tensor | None
) -> Tensor:
    y_TN = products_TN * factors_T1
    if scales_N is not None:
        y_TN *= scales_N
    if bias_N is not None:
        y_TN += bias_N
    return y_TN


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
