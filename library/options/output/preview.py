"""Pictures drawn during training."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.output.samplers import ALIASES, SAMPLERS


@dataclass(frozen=True)
class PreviewOptions(Options, affects_training=False):
    """Pictures drawn during training."""

    sample_every_n_steps: int | None = option(
        None,
        usual=True,
        help="Draw pictures every N steps. Unset or 0 draws none; --sample_every_n_epochs wins.",
    )
    sample_at_first: bool = option(False, usual=True, help="Draw pictures before the first step too, to compare with.")
    sample_every_n_epochs: int | None = option(
        None,
        usual=True,
        refused_by_leco="a run that is trained by prompts alone has steps and no epochs; use --sample_every_n_steps",
        help="Draw pictures every N epochs. Unset or 0 draws none.",
    )
    sample_prompts: str | None = option(
        None,
        usual=True,
        help="File with the prompts to draw pictures of: .txt with one a line, .toml or .json.",
    )
    sample_sampler: str = option(
        "ddim",
        help="Sampler that draws the pictures, for Stable Diffusion 1, 2 and XL.",
        choices=(*SAMPLERS, *ALIASES),
    )
