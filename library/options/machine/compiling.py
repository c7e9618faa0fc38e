"""Compiling the blocks of the denoiser."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import whole

ON = ("compile", "torch_compile")
COMPILERS = (
    "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
    "tensort", "ipex", "tvm",
)  # fmt: skip


@dataclass(frozen=True)
class CompileOptions(Options):
    """Compiling the blocks of the denoiser."""

    compile: bool = option(False)
    """Compile the blocks of the denoiser, each kind of block once. Steps get faster; the first ones take minutes, and
    so does the first of each new image size."""
    compile_backend: str = option("inductor", needs=ON)
    """Compiler that --compile uses."""
    compile_mode: str = option(
        "default", needs=ON, choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    )
    """Optimization mode of the compiler, as in torch.compile."""
    compile_dynamic: str | None = option(None, needs=ON, choices=("true", "false", "auto"))
    """true, auto and unset compile once for all image sizes. false compiles each size separately, which is faster if
    there are few sizes."""
    compile_fullgraph: bool = option(False, needs=ON)
    """Fail if a block cannot be compiled as one graph, instead of compiling it in parts."""
    compile_cache_size_limit: int | None = option(None, kind=whole(1), needs=ON)
    """Maximum number of compilations of one kind of block, for new sizes. Further sizes run uncompiled. Unset is
    128."""
    torch_compile: bool = option(False)
    """The old name of --compile."""
    dynamo_backend: str = option(
        "inductor",
        needs="torch_compile",
        takes_other_values=True,  # torch knows which of them are installed
        help="Compiler that --torch_compile uses.",
        choices=COMPILERS,
    )

    cuda_graphs: bool = option(
        False,
        unsupported="training steps are not recorded as CUDA graphs. Use --compile instead, which is available for "
        "every base model.",
    )
    """Not supported: use --compile."""

    @property
    def is_on(self) -> bool:
        return self.compile or self.torch_compile
