"""Trading speed for memory, and attention kernels."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class MemoryOptions(Options):
    """Trading speed for memory, and attention kernels."""

    gradient_checkpointing: bool = option(
        False,
        help="Compute activations again in the backward pass in place of keeping them. Saves much memory for about a "
        "quarter more time.",
    )
    cpu_offload_checkpointing: bool = option(
        False,
        help="Keep the activations of --gradient_checkpointing in main memory in place of the card's.",
    )
    lowram: bool = option(False, help="Load models straight to the card, for machines with little main memory.")
    highvram: bool = option(
        False,
        help="Do not empty the card's memory cache while caching. A little faster where memory is plentiful.",
    )
    xformers: bool = option(False, help="Compute attention with the xformers library, which must be installed.")
    sdpa: bool = option(False, help="Compute attention with PyTorch's scaled dot product, fast and sparing of memory.")
    mem_eff_attn: bool = option(
        False,
        help="Compute attention piece by piece: slow, but for cards that can do neither --sdpa nor --xformers.",
    )
    torch_compile: bool = option(False, help="Compile the models with torch.compile. The first steps take minutes.")
    dynamo_backend: str = option(
        "inductor",
        needs="torch_compile",
        help="Compiler that --torch_compile uses.",
        choices=(
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ),
    )
