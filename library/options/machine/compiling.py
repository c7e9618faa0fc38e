"""Compiling the blocks of the denoiser."""

from dataclasses import dataclass

from library.options.base import Options, option

ON = ("compile", "torch_compile")


@dataclass(frozen=True)
class CompileOptions(Options):
    """Compiling the blocks of the denoiser."""

    compile: bool = option(
        False,
        own=True,
        help="Compile the blocks of the denoiser, each kind of block once. Steps get faster; the first ones take "
        "minutes, and so does the first of each new image size.",
    )
    compile_backend: str = option("inductor", own=True, needs=ON, help="Compiler that --compile uses.")
    compile_mode: str = option(
        "default",
        own=True,
        needs=ON,
        help="What the compiler aims at.",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_dynamic: str | None = option(
        None,
        own=True,
        needs=ON,
        help="Whether one compilation serves all image sizes, which unset and auto are too. false compiles each size "
        "for itself: faster where there are few.",
        choices=("true", "false", "auto"),
    )
    compile_fullgraph: bool = option(
        False,
        own=True,
        needs=ON,
        help="Stop where a block cannot be compiled in one piece, in place of compiling it in several.",
    )
    compile_cache_size_limit: int | None = option(
        None,
        own=True,
        at_least=1,
        needs=ON,
        help="How often one kind of block is compiled at most, for new sizes. What comes later runs uncompiled. Unset "
        "is 128.",
    )
    torch_compile: bool = option(False, help="The old name of --compile.")
    dynamo_backend: str = option(
        "inductor",
        needs="torch_compile",
        takes_other_values=True,  # torch knows which of them are installed
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

    cuda_graphs: bool = option(
        False,
        own=True,
        unsupported="training steps are not recorded as CUDA graphs. Use --compile instead, which is available for "
        "every base model.",
        help="Not supported: use --compile.",
    )

    @property
    def is_on(self) -> bool:
        """Return True if blocks are compiled."""
        return self.compile or self.torch_compile
