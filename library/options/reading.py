"""How model files are read; every base model but Stable Diffusion 1 and 2 has this group."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ReadingOptions(Options):
    """How model files are read."""

    disable_mmap_load_safetensors: bool = option(
        False,
        help="Read model files without mapping them into memory. Files are always read that way here, tensor by "
        "tensor, so it changes nothing.",
    )
