"""The operations that torch's deterministic mode refuses on a GPU."""

import re
from collections.abc import Mapping, Sequence

import torch

# First name of each line in the second list of `torch.use_deterministic_algorithms`' docstring -> operations of aten.
REFUSED: Mapping[str, Sequence[str]] = {
    "torch.nn.AvgPool3d": ["avg_pool3d_backward"],
    "torch.nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "torch.nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "torch.nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "torch.nn.MaxUnpool1d": ["max_unpool2d"],
    "torch.nn.MaxUnpool2d": ["max_unpool2d"],
    "torch.nn.MaxUnpool3d": ["max_unpool3d"],
    "torch.nn.functional.interpolate": [
        "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
    ],
    "torch.nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "torch.nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "torch.nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "torch.nn.NLLLoss": ["nll_loss2d_forward"],
    "torch.nn.CTCLoss": ["_ctc_loss_backward"],
    "torch.nn.EmbeddingBag": ["_embedding_bag_dense_backward"],
    "torch.Tensor.put_": ["put", "put_"],
    "torch.histc": ["histc"],
    "torch.bincount": ["bincount"],
    "torch.median": ["median.dim", "nanmedian.dim"],
    "torch.nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "torch.cumsum": ["cumsum", "cumsum_"],
    "torch.Tensor.scatter_reduce": ["scatter_reduce"],  # with a product, which is not checked
    "torch.Tensor.resize_": [],  # of quantized tensors
}  # fmt: skip
FLOATING_ONLY = ("cumsum", "cumsum_")


def listed_by_torch() -> list[str]:
    """Return the first name of each entry in the docstring's list of refused operations, without those that are
    refused on MPS alone, which torch 2.15 lists too."""
    doc = torch.use_deterministic_algorithms.__doc__
    assert doc is not None
    _, _, listed = doc.partition("normally-nondeterministic operations will throw a")
    listed, _, _ = listed.partition("In addition")
    entries = re.findall(r"^\s+\* :\w+:`([\w.]+)`(.*(?:\n(?!\s+\* ).*)*)", listed, re.MULTILINE)
    return [name for name, when in entries if "MPS" not in when or "CUDA" in when]


def names() -> list[str]:
    """Return the operations' names with their namespace, such as "aten::histc"."""
    return [f"aten::{name}" for names_of_line in REFUSED.values() for name in names_of_line]


def is_refused(func: torch._ops.OpOverload, dtype: torch.dtype) -> bool:
    """Return True if deterministic mode refuses a call on a GPU; `dtype` is that of its first argument."""
    packet, overload = func._schema.name, f"{func._schema.name}.{func._overloadname}"
    if packet.removeprefix("aten::") in FLOATING_ONLY and not dtype.is_floating_point:
        return False
    return packet in names() or overload in names()
