"""Why a pipeline cannot be trained, as far as its class and its small files show it, and what to use instead."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.architectures.specs import list_specs
from library.models.identify import bases_of_pipeline

TEXT_TO_IMAGE = "use the model's text-to-image pipeline"
# In names of classes whose image is needed, though it is optional.
EDITS = ("Edit", "Img2Img", "ImageTo", "Image2", "I2V", "Pix2Pix", "Refiner", "SuperResolution")
PRECONDITIONED = "EDM"  # begins the names of schedulers that scale the model's input and output by the noise level
DISTILLED = ("LCM", "SCM", "TCD", "CMStochastic", "Wuerstchen", "FlowMatchLCM", "HeliosDMD")


SEEN = re.compile(r"(?!.*ip_adapter)(.*_)?(images?|videos?|boxes|phrases)")  # names of what a model sees or is told


def list_other_inputs(options: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the arguments of a pipeline's call that must be given beside a caption, and the pictures and boxes that
    may have to be."""
    return [
        name for name, option in options.items()
        if name not in ("self", "prompt") and option.kind in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY)
        and (option.default is option.empty or (option.default is None and SEEN.fullmatch(name)))
    ]  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """What is known of a pipeline before weights are read."""

    name: str
    options: Mapping[str, inspect.Parameter]  # of its call
    components: Sequence[str]  # that it is built with
    scheduler: str
    variance: str  # what its scheduler says of the predicted variance

    def requires(self, *names: str) -> bool:
        """Return True if one of these options must be given."""
        found = [self.options[name] for name in names if name in self.options]
        return any(option.default is option.empty for option in found)

    def has(self, *names: str) -> bool:
        return any(name in self.options for name in names)

    @property
    def unknown(self) -> list[str]:
        """The arguments that must be given and that are no caption."""
        return [name for name in list_other_inputs(self.options) if self.requires(name)]


def name_script(name: str) -> str:
    """Return the script of the model that a pipeline edits with; "" without one."""
    specs = bases_of_pipeline(list_specs(), name)
    return f"; {specs[0].script} trains its base model" if specs else ""


CAUSES: Sequence[tuple[Callable[[Candidate], bool], str]] = (
    (
        lambda p: (
            any(part.startswith(("controlnet", "adapter")) for part in p.components)
            or re.search(r"ControlNet|Control(?!.*(Inpaint|Img2Img))", p.name) is not None
        ),
        f"is steered by a ControlNet or an adapter that sees an image; {TEXT_TO_IMAGE}",
    ),
    (
        lambda p: p.has("mask_image", "mask_video") or p.requires("mask"),
        f"is for inpainting, which this script does not train; {TEXT_TO_IMAGE}",
    ),
    (
        lambda p: p.requires("image_embeds", "image_embeddings", "prior_embeds") and not p.has("prior_guidance_scale"),
        "draws from what a prior model makes of a text, so captions do not reach it; train the prior's model",
    ),
    (
        lambda p: any(part.startswith("prior_") for part in p.components),
        "joins a prior and a decoder, two models that draw; this script trains one",
    ),
    (
        lambda p: (
            p.has("strength")
            or p.requires("image", "images", "control_image", "reference_image")
            or (p.has("image", "images") and any(word in p.name for word in EDITS))
        ),
        "draws from other images, which this script does not train{script}; " + TEXT_TO_IMAGE,
    ),
    (
        lambda p: (
            p.requires("video", "videos", "control_video", "conditions") or (p.has("video") and "VideoTo" in p.name)
        ),
        "draws from other videos, which this script does not train; use the model's text-to-video pipeline",
    ),
    (
        lambda p: (
            "Audio" in p.name
            or p.has("audio_length_in_s", "audio_end_in_s", "audio_duration")
            or "audio_vae" in p.components
        ),
        "makes sound, which this script does not train",
    ),
    (lambda p: "prompt" not in p.options, "does not draw from text, so no captions can train it"),
    (
        lambda p: p.scheduler.startswith(DISTILLED),
        "draws with {scheduler}, so the model is distilled to a few steps, which training would undo. Use the model "
        "that it was distilled from",
    ),
    (
        lambda p: p.scheduler.startswith(PRECONDITIONED),
        "draws with {scheduler}, whose scaling of input and output by the noise level this script does not train",
    ),
    (
        lambda p: p.variance.startswith("learned"),
        "predicts the variance of the noise too, which this script does not train",
    ),
    (lambda p: "height" not in p.options, "has no argument for the height of the image"),
    (lambda p: bool(p.unknown), "needs {unknown} beside a caption, which this script does not give"),
)
"""(True if it applies, the sentence), the first that applies is said."""


def find_cause(kind: type[Any], components: Sequence[str], scheduler: str, config: Mapping[str, Any]) -> str | None:
    """Return why a pipeline is not made to draw images from text, or cannot be trained; None if nothing shows it."""
    options = dict(list(inspect.signature(kind.__call__).parameters.items())[1:])
    candidate = Candidate(kind.__name__, options, components, scheduler, str(config.get("variance_type")))
    for applies, sentence in CAUSES:
        if applies(candidate):
            unknown = ", ".join(candidate.unknown)
            return sentence.format(scheduler=scheduler, script=name_script(kind.__name__), unknown=unknown)
    return None
