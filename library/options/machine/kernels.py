"""Options for the kernels of CUDA GPUs."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class KernelOptions(Options, own=True):
    """Kernels of CUDA GPUs."""

    cuda_allow_tf32: bool = option(
        False,
        help="Multiply and convolve what is in 32 bits as TF32 on CUDA cards that have it: faster, with ten bits of "
        "precision. What --mixed_precision computes in 16 bits stays as it is.",
    )
    cuda_cudnn_benchmark: bool = option(
        False,
        unless="deterministic",
        help="Let cuDNN time its convolutions on the CUDA card for each new shape and keep the fastest. Helps where "
        "few sizes of images are trained; --deterministic overrides it.",
    )
