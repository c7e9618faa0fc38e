"""Recording steps for a CUDA card."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class GraphOptions(Options):
    """Recording steps for a CUDA card."""

    cuda_graphs: bool = option(
        False,
        own=True,
        refused_by_leco="each step asks the denoiser another number of times; leave it out",
        help="Record a step once for each shape of a batch, and let the CUDA card repeat it as one piece of work. It "
        "helps where small models at batch 1 leave the card waiting. What cannot be recorded is refused.",
    )
