"""Pictures drawn during training."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class PreviewOptions(Options):
    """Pictures drawn during training."""

    sample_every_n_steps: int | None = option(None, help="")
    sample_at_first: bool = option(False, help="")
    sample_every_n_epochs: int | None = option(None, help="")
    sample_prompts: str | None = option(None, help="")
    sample_sampler: str = option("ddim", help="", choices=("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"))
