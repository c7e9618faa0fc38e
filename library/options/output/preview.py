"""Images drawn during training."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.output.sampler_names import ALIASES, SAMPLERS

TIMES = ("sample_every_n_epochs", "sample_every_n_steps", "sample_at_first")


@dataclass(frozen=True)
class PreviewOptions(Options, affects_training=False):
    """Images drawn during training."""

    sample_every_n_steps: int | None = option(None, usual=True, needs="sample_prompts", unless="sample_every_n_epochs")
    """Draw images every N steps. Unset or 0 draws none; --sample_every_n_epochs wins."""
    sample_at_first: bool = option(False, usual=True, needs="sample_prompts")
    """Draw images before the first step too, to compare with."""
    sample_every_n_epochs: int | None = option(
        None,
        usual=True,
        refused_by_leco="a run that is trained by prompts alone has steps and no epochs; use --sample_every_n_steps",
        needs="sample_prompts",
        zero_is_unset=True,
    )
    """Draw images every N epochs. Unset or 0 draws none."""
    sample_prompts: str | None = option(None, path="file", usual=True, needs=TIMES)
    """File with the prompts to draw images of: .txt with one a line, .toml or .json."""
    walk_seed: bool = option(False, needs=TIMES)
    """Raise the seed of each prompt by its number in the file: by 0 for the first, by 1 for the second."""
    sample_with_training_adapter: bool = option(False, needs="training_adapter")
    """Draw images with the adapter of --training_adapter too."""
    sample_sampler: str = option(
        "ddim",
        needs=TIMES,
        takes_other_values=True,  # not checked in runs without previews
        help="Sampler that draws the images, for Stable Diffusion 1, 2 and XL.",
        choices=(*SAMPLERS, *ALIASES),
    )
    score_previews: bool = option(
        False, needs=TIMES, needs_images=True, excludes={"dataset_class": "its images are not known one by one"}
    )
    """Score the images: sharpness, near-copies of training images, and what --score_models measure."""
    score_models: list[str] | None = option(None, path="model", logged=False, needs="score_previews", nargs="+")
    """Models that score images on the CPU, each a folder or a Hugging Face name: a DINOv2 model for their similarity to
    the training images, such as dinov2-base (0.35 GB, Apache 2.0), a CLIP model for their agreement with the prompts,
    such as clip-vit-base-patch32 (0.6 GB, MIT). Unset loads none."""
