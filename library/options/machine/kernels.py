"""Options for the kernels of CUDA GPUs."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class KernelOptions(Options):
    """Kernels of CUDA GPUs."""

    cuda_allow_tf32: bool = option(False)
    """Compute 32-bit matmuls and convolutions in TF32 on CUDA GPUs that support it: faster, with ten bits of precision.
    What --mixed_precision computes in 16 bits is unchanged."""
    cuda_cudnn_benchmark: bool = option(False, unless="deterministic")
    """Let cuDNN time its convolutions on the CUDA GPU for each new shape and keep the fastest. Helps with few different
    image sizes; --deterministic overrides it."""
    no_fused_operations: bool = option(False, unless="deterministic")
    """Do not compile norms, gates and activations on CUDA GPUs. Slower, with more memory; for machines whose compiler
    fails during a run."""
