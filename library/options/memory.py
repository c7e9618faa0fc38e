"""Trading speed for memory, and attention kernels."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class MemoryOptions(Options):
    """Trading speed for memory, and attention kernels."""

    gradient_checkpointing: bool = option(
        False,
        usual=True,
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


@dataclass(frozen=True)
class SwappingOptions(Options):
    """Which blocks of a transformer wait in main memory."""

    blocks_to_swap: int | None = option(
        None,
        usual=True,
        help="Number of transformer blocks that wait in main memory and are exchanged with the card's while computing. "
        "Saves the card's memory and costs time.",
    )


@dataclass(frozen=True)
class PrecisionOptions(Options):
    """Number formats of weights and arithmetic."""

    mixed_precision: str = option(
        "no",
        usual=True,
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
        usual=True,
        help="Keep the adapter and its gradients in bf16 too. Needs --mixed_precision bf16; saves memory and loses "
        "accuracy.",
    )
    fp8_base: bool = option(
        False, usual=True, help="Keep the frozen base model in 8 bits. Needs --mixed_precision fp16 or bf16."
    )
    fp8_base_unet: bool = option(
        False,
        help="Keep the frozen denoiser in 8 bits and the text encoders in the format of --mixed_precision.",
    )

    @property
    def shrinks_denoiser(self) -> bool:
        """Whether the denoiser is to be kept in 8 bits."""
        return self.fp8_base or self.fp8_base_unet
