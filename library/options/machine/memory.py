"""Trading speed for memory, and attention kernels."""

from dataclasses import dataclass

from library.options.base import Options, option, without_effect
from library.options.kinds import whole
from library.options.machine.base_formats import BASE_FORMATS

ONE_FORMAT = {  # excluded by the older 8-bit options
    f"base_format={'|'.join(name for name in BASE_FORMATS if name != 'fp8')}": "each names a format of the same weights"
}
ONLY_TO_THE_GPU = (
    "swapped blocks are frozen and always only copied to the GPU, with every base model and without "
    "--gradient_checkpointing too"
)
PINNED = "swapped blocks are in pinned memory as far as the system allows it"
THROUGH_MAIN_MEMORY = (
    "models are loaded one after the other through main memory; --fp8_base halves what the largest takes"
)
ATTENTION_MODES = ("torch", "xformers", "flash", "sageattn", "sdpa")  # values of --attn_mode


@dataclass(frozen=True)
class MemoryOptions(Options):
    """Trading speed for memory, and attention kernels."""

    gradient_checkpointing: bool = option(
        False,
        usual=True,
        affects_training=False,
        help="Recompute activations in the backward pass instead of keeping them. Saves much memory for about a "
        "quarter more time.",
    )
    gradient_checkpointing_every: int = option(
        1,
        kind=whole(1),
        needs=("gradient_checkpointing", "unsloth_offload_checkpointing"),
        affects_training=False,
        help="Recompute the activations of every N-th block and keep those of the others: 2 costs half the time of "
        "--gradient_checkpointing and saves half as much. Unset is every block.",
    )
    cpu_offload_checkpointing: bool = option(
        False,
        needs=("gradient_checkpointing", "unsloth_offload_checkpointing"),
        affects_training=False,
        help="Offload the block inputs that --gradient_checkpointing keeps to main memory.",
    )
    unsloth_offload_checkpointing: bool = option(
        False, affects_training=False, help="--gradient_checkpointing and --cpu_offload_checkpointing in one."
    )
    blocks_to_swap: int | None = option(
        None,
        kind=whole(0),
        usual=True,
        affects_training=False,
        help="Number of the denoiser's blocks whose weights are offloaded to main memory until they are needed. Saves "
        "GPU memory; the cost in time depends on how long a block computes. In models with two kinds of blocks, half "
        "of the number are offloaded from the first kind, and two blocks of the second kind count as one; if one kind "
        "has too few, more of the other are offloaded.",
    )
    block_swap_ring_size: int = option(
        2,
        kind=whole(1),
        needs="blocks_to_swap",
        affects_training=False,
        help="Number of GPU buffers through which the blocks of --blocks_to_swap pass. 2 copies one block while "
        "another computes, more also hide copies of uneven length, and 1 takes the least memory but copies and "
        "computes in turn.",
    )
    block_swap_h2d_only: bool = without_effect(False, ONLY_TO_THE_GPU, affects_training=False)
    use_pinned_memory_for_block_swap: bool = without_effect(False, PINNED, affects_training=False)
    lowram: bool = without_effect(False, THROUGH_MAIN_MEMORY, affects_training=False)
    highvram: bool = option(
        False,
        affects_training=False,
        help="Do not empty the GPU's memory cache while caching. A little faster with plenty of memory.",
    )
    xformers: bool = option(False, help="Compute attention with the xformers library, if it is installed.")
    sdpa: bool = option(False, help="Compute attention with PyTorch's scaled dot product, fast and sparing of memory.")
    mem_eff_attn: bool = option(
        False, help="Compute attention in small parts: slow, for GPUs that support neither --sdpa nor --xformers."
    )

    @property
    def num_offloaded(self) -> int:
        """The number of offloaded blocks, as --blocks_to_swap counts them."""
        return self.blocks_to_swap or 0

    @property
    def recomputes(self) -> bool:
        """Return True if blocks are recomputed in the backward pass."""
        return self.gradient_checkpointing or self.unsloth_offload_checkpointing

    @property
    def offloads_inputs(self) -> bool:
        """Return True if the inputs of recomputed blocks are offloaded."""
        return self.recomputes and (self.cpu_offload_checkpointing or self.unsloth_offload_checkpointing)


@dataclass(frozen=True)
class PrecisionOptions(Options):
    """Number formats of weights and arithmetic."""

    mixed_precision: str = option(
        "no",
        usual=True,
        help="Number format of arithmetic and of the frozen models: no is 32 bits, bf16 needs a recent GPU, fp16 "
        "uses a scaler for small gradients.",
        choices=("no", "fp16", "bf16"),
    )
    full_fp16: bool = option(
        False,
        requires="mixed_precision=fp16",
        help="Keep the adapter and its gradients in fp16 too. Needs --mixed_precision fp16; saves memory and loses "
        "accuracy.",
    )
    full_bf16: bool = option(
        False,
        requires="mixed_precision=bf16",
        usual=True,
        help="Keep the adapter and its gradients in bf16 too. Needs --mixed_precision bf16; saves memory and loses "
        "accuracy.",
    )
    fp8_base: bool = option(
        False,
        usual=True,
        requires="mixed_precision=bf16|fp16",
        excludes=ONE_FORMAT,
        help="Keep the frozen base model in 8 bits. Needs --mixed_precision fp16 or bf16.",
    )
    fp8_base_unet: bool = option(
        False,
        requires="mixed_precision=bf16|fp16",
        excludes=ONE_FORMAT,
        help="Keep the frozen denoiser in 8 bits and the text encoders in the format of --mixed_precision.",
    )

    base_format: str | None = option(
        None,
        usual=True,
        choices=BASE_FORMATS,
        help="Storage format of the weights of the frozen denoiser's blocks, and of text encoders that stay loaded; "
        "arithmetic is in --mixed_precision. fp8 and int8 take a byte per weight, int8_rotated is the most accurate "
        "8-bit format for layers with outliers, nf4 takes about half a byte and needs bitsandbytes, nf4_double a "
        "little less.",
    )

    base_arithmetic: str = option(
        "decoded",
        choices=("decoded", "8bit"),
        help="How the denoiser's blocks multiply with weights stored in 8 bits: decoded to the format of "
        "--mixed_precision, or directly in 8bit, with activations and gradients rounded to 8 bits too. The latter is "
        "faster on some GPUs, with about twice the rounding error; best with --base_format int8_rotated.",
    )

    @property
    def multiplies_codes(self) -> bool:
        """Return True if the denoiser's blocks multiply matrices in 8 bits."""
        return self.base_arithmetic == "8bit"

    @property
    def denoiser_format(self) -> str | None:
        """The weight format of the denoiser's blocks; None for the dtype of --mixed_precision."""
        return self.base_format or ("fp8" if self.fp8_base or self.fp8_base_unet else None)

    @property
    def text_encoder_format(self) -> str | None:
        """The weight format of loaded text encoders; None for the dtype of --mixed_precision."""
        return self.base_format or ("fp8" if self.fp8_base else None)


@dataclass(frozen=True)
class ScaledPrecisionOptions(PrecisionOptions):
    """Number formats of weights and arithmetic."""

    fp8_scaled: bool = option(
        False,
        excludes=ONE_FORMAT,
        usual=True,
        help="Keep the frozen denoiser in 8 bits with a scale for each row, in any --mixed_precision.",
    )

    @property
    def denoiser_format(self) -> str | None:
        return super().denoiser_format or ("fp8" if self.fp8_scaled else None)
