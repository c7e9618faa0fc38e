"""Options for training concepts from prompts alone (LECO)."""

from dataclasses import dataclass

from library.options.base import Options, option

MOST_DENOISING_STEPS = 1000  # the length of the schedule
USUAL_GUIDANCE = 3.0  # sd-scripts' default


@dataclass(frozen=True)
class ConceptOptions(Options):
    """Concepts to change by prompts alone (LECO)."""

    prompts_file: str | None = option(
        None,
        usual=True,
        kept_in_state=True,
        help="TOML file with the prompts: what each of them is to become, at which size. docs/train_leco.md has every "
        "key.",
    )
    max_denoising_steps: int = option(
        40,
        usual=True,
        at_least=2,
        at_most=MOST_DENOISING_STEPS,
        help="Steps from noise to an image. Each training step draws how many of them it takes, 1 to one less than "
        "this, before it learns from what is there by then.",
    )
    leco_denoise_guidance_scale: float | None = option(
        None,
        usual=True,
        at_least=0,
        help="Strength of classifier-free guidance on that way; guidance_scale in the file is how far the concept is "
        f"moved. Unset is {USUAL_GUIDANCE:g}, or 1, which is none, for models that draw without it.",
    )
