"""Options that keep the guidance of a distilled model."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number


@dataclass(frozen=True)
class GuidanceOptions(Options):
    """Training that keeps the guidance of a distilled model."""

    guidance_loss: float | None = option(
        None,
        kind=number(1.0),
        refused_by_leco="the targets there are the base model's own predictions; leave it out",
        excludes={"preference_loss": "it compares predictions of images, whose guidance cancels out"},
    )
    """Keep the guidance of a distilled model: fit the mean of one part v_cond and SCALE - 1 parts v_uncond, the
    prediction without the caption, in place of v_cond. Begin with 1.5; 1 is the plain loss. A step takes up to half as
    long again."""
    guidance_loss_caption: str = option("", needs="guidance_loss", needs_images=True)
    """Caption of v_uncond. Empty is what caption dropout trains."""

    @property
    def guidance_scale_of_loss(self) -> float | None:
        """The scale; None for the plain loss."""
        return None if self.guidance_loss in (None, 1.0) else self.guidance_loss


NO_GUIDANCE = GuidanceOptions()
