"""Options for training concepts from prompts alone (LECO)."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number, whole

MOST_DENOISING_STEPS = 1000  # the length of the schedule
USUAL_GUIDANCE = 3.0  # sd-scripts' default


@dataclass(frozen=True)
class ConceptOptions(Options):
    """Concepts to change by prompts alone (LECO)."""

    prompts_file: str | None = option(None, path="file", usual=True, kept_in_state=True)
    """TOML file with the prompts: how each of them is changed, and at which size. docs/train_leco.md lists every
    key."""
    max_denoising_steps: int = option(40, usual=True, kind=whole(2, MOST_DENOISING_STEPS))
    """Number of denoising steps from noise to an image. Each training step runs a random number of them, from 1 to one
    less than this, and trains on the resulting latents."""
    leco_denoise_guidance_scale: float | None = option(
        None,
        usual=True,
        kind=number(0),
        help="Scale of classifier-free guidance during these denoising steps; guidance_scale in the file is how far "
        f"the concept is moved. Unset is {USUAL_GUIDANCE:g}, or 1, which is none, for models that generate without it.",
    )
