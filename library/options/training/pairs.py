"""Options for training on pairs of images that share a caption."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number

EXCLUDES = {
    "dataset_class": "its batches have no pairs",
    "train_inpainting": "both images of a pair would need the same mask",
}


@dataclass(frozen=True)
class PairOptions(Options, needs_images=True):
    """Training on pairs of images: those of a subset, and those of its opposite_dir."""

    preference_loss: str | None = option(
        None, choices=(None, "dpo"), excludes={**EXCLUDES, "pair_slider": "each trains pairs in its own way"}
    )
    """Train on preferences: each image is preferred to the one of its name in the subset's opposite_dir. dpo is
    Diffusion-DPO; its reference is the model without the adapter."""
    preference_beta: float = option(2000.0, kind=number(above=0), needs="preference_loss=dpo")
    """How strongly --preference_loss dpo ties the adapter to the model without it; 2000 to 5000 are usual. Lower values
    let it move further."""
    pair_slider: float | None = option(None, kind=number(above=0), excludes=EXCLUDES)
    """Train a slider from pairs: one adapter, at this strength on the images and at minus this strength on those of the
    subset's opposite_dir. 1 is usual."""

    @property
    def are_trained(self) -> bool:
        return self.preference_loss is not None or self.pair_slider is not None


NO_PAIRS = PairOptions()
