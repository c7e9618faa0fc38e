"""Trading speed for memory, and attention kernels."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class MemoryOptions(Options):
    """Trading speed for memory, and attention kernels."""

    gradient_checkpointing: bool = option(False, help="")
    cpu_offload_checkpointing: bool = option(False, help="")
    lowram: bool = option(False, help="")
    highvram: bool = option(False, help="")
    xformers: bool = option(False, help="")
    sdpa: bool = option(False, help="")
    mem_eff_attn: bool = option(False, help="")
    torch_compile: bool = option(False, help="")
    dynamo_backend: str = option("inductor", help="", choices=("eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm"))
