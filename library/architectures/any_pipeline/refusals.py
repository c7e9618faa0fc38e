"""Why a pipeline cannot be trained, as far as its class and its small files show it, and what to use instead."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.architectures.specs import list_specs
from library.checkpoints.base_model_spec import bases_of_pipeline

# In names of classes whose image is needed, though it is optional.
EDITS = ("Edit", "Img2Img", "ImageTo", "Image2", "I2V", "Pix2Pix")
ENLARGES = ("Upscale", "SuperResolution")
UNDONE = "distilled to a few steps, which training would undo. Use the model that it was distilled from"
OWN_KINDS: Mapping[str, str] = {
    "Amused": "draws tokens of a codebook, which have no noise levels",
    "AnyFlow": "is told two noise levels, of a flow map, of which this script tells one",
    "AnyFlowFAR|Helios|HeliosPyramid|LTXI2VLongMultiPrompt": "draws the parts of a video one after another",
    "Allegro": "has a VAE that encodes 24 frames or more, so images cannot train it; use a model that WanPipeline "
    "draws with",
    "Cosmos3Omni|GlmImage|OmniGen": "draws with a language model, which this script does not train",
    "LatentConsistencyModel|SanaSprint": f"is {UNDONE}",
    "DreamLiteMobile": f"is {UNDONE}, DreamLitePipeline",
    "StableDiffusionLDM3D": "draws depth beside the image",
    "StableDiffusionParadigms": "computes steps in parallel with a scheduler of its own",
    "StableDiffusionPix2PixZero": "draws from another image, which it inverts",
    "TextToVideoZero(SDXL)?": "draws with attention between frames",
    "UniDiffuser": "draws image and text together",
}
"""Names of diffusers' classes without "Pipeline" -> the sentence, where arguments and parts do not show it."""
WORDS = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z][a-z]*\d*")  # of the name of a class
NO_VAE = "draws without a VAE, which this script does not train"
PRECONDITIONED = "EDM"  # begins the names of schedulers that scale the model's input and output by the noise level
DISTILLED = (
    "LCM", "SCM", "TCD", "CMStochastic", "Wuerstchen", "FlowMatchLCM", "HeliosDMD", "FlowMap", "Piflow",
)  # fmt: skip


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
    """Facts of a pipeline before weights are read."""

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
    def sees_images(self) -> bool:
        """True if a part sees images and there is no other prompt than its own, or none."""
        return "siglip" in self.components or "prompt" not in self.options

    @property
    def unknown(self) -> list[str]:
        """The arguments that must be given and that are no caption."""
        return [name for name in list_other_inputs(self.options) if self.requires(name)]


def name_script(name: str) -> str:
    """Return the script of the model that a pipeline edits with; "" without one."""
    specs = bases_of_pipeline(list_specs(), name)
    if specs and specs[0].latents.max_references:
        return f"; {specs[0].script} trains it, also with pairs of images"
    return f"; {specs[0].script} trains its base model" if specs else ""


def name_plain(name: str) -> str:
    """Return what to use instead: the pipeline of diffusers that draws with such a model from a caption alone, by the
    beginning of its name."""
    import diffusers

    words = WORDS.findall(name.removesuffix("Pipeline"))
    stems = [re.sub("I2[VI]$", "T2V", name.removesuffix("Pipeline")), *map("".join, shorten(words))]
    for other in (f"{stem}Pipeline" for stem in stems if f"{stem}Pipeline" != name):
        kind: Any = getattr(diffusers, other, None)
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            candidate = describe(kind, tuple(inspect.signature(kind).parameters), "", {})
            if find_sentence(candidate) is None and {"vae", "movq"} & {*candidate.components}:
                return f"use a model that {other} draws with"
    return "use a model that draws from a caption alone"


def shorten(words: Sequence[str]) -> list[Sequence[str]]:
    """Return the beginnings of a list, the longest first."""
    return [words[:count] for count in range(len(words) - 1, 0, -1)]


CAUSES: Sequence[tuple[Callable[[Candidate], bool], str]] = (
    (
        lambda p: (
            any(part.startswith(("controlnet", "adapter")) for part in p.components)
            or re.search(r"ControlNet|Control(?!.*(Inpaint|Img2Img))", p.name) is not None
        ),
        "is steered by a ControlNet or an adapter that sees an image; {plain}",
    ),
    (
        lambda p: (
            "Audio" in p.name
            or p.has("audio_length_in_s", "audio_end_in_s", "audio_duration")
            or "audio_vae" in p.components
        ),
        "makes sound, which this script does not train",
    ),
    (
        lambda p: p.has("mask_image", "mask_video") or p.requires("mask") or (p.has("mask") and p.has("video")),
        "is for inpainting, which this script does not train; {plain}",
    ),
    (
        lambda p: p.requires("image_embeds", "image_embeddings", "prior_embeds") and not p.has("prior_guidance_scale"),
        "draws from what a prior model makes of a text, so captions do not reach it; {plain}",
    ),
    (
        lambda p: any(part.startswith("prior_") for part in p.components),
        "joins a prior and a decoder, two models that draw, and this script trains one; {plain}",
    ),
    (
        lambda p: "Prior" in WORDS.findall(p.name) and not p.has("image"),
        "is a prior: it makes what another pipeline draws from; {plain}",
    ),
    (lambda p: "Refiner" in p.name, "is a refiner, which starts from the image of another model; {plain}"),
    (
        lambda p: p.has("image") and "Img2Img" not in p.name and any(word in p.name for word in ENLARGES),
        "enlarges images of other models; {plain}",
    ),
    (
        lambda p: (
            p.requires("video", "videos", "control_video", "conditions") or (p.has("video") and "VideoTo" in p.name)
        ),
        "draws from other videos, which this script does not train; {plain}",
    ),
    (
        lambda p: (
            p.has("strength")
            or p.requires("image", "images", "control_image", "reference_image")
            or (p.has("image", "images") and (p.sees_images or any(word in p.name for word in EDITS)))
        ),
        "draws from other images, which this script does not train{script}; {plain}",
    ),
    (lambda p: p.has("gligen_boxes"), "draws things in boxes, which this script does not give; {plain}"),
    (lambda p: "prompt" not in p.options, "does not draw from text, so no captions can train it"),
    (lambda p: p.scheduler.startswith(DISTILLED), f"draws with {{scheduler}}, so the model is {UNDONE}"),
    (
        lambda p: p.scheduler.startswith(PRECONDITIONED),
        "draws with {scheduler}, whose scaling of input and output by the noise level this script does not train; "
        "use a model with a scheduler of flows or of DDPM",
    ),
    (
        lambda p: p.variance.startswith("learned"),
        "predicts the variance of the noise too, which this script does not train",
    ),
    (
        lambda p: "height" not in p.options,
        "has no argument for the height of an image, so it draws at one size alone, or no images",
    ),
    (lambda p: bool(p.unknown), "needs {unknown} beside a caption, which this script does not give"),
)
"""(True if it applies, the sentence), the first that applies is said."""


def find_sentence(candidate: Candidate) -> str | None:
    """Return the sentence of the first cause that applies, with its gaps."""
    own = next((s for name, s in OWN_KINDS.items() if re.fullmatch(f"(?:{name})Pipeline", candidate.name)), None)
    return next((sentence for applies, sentence in CAUSES if applies(candidate)), own)


def describe(kind: type[Any], components: Sequence[str], scheduler: str, config: Mapping[str, Any]) -> Candidate:
    options = dict(list(inspect.signature(kind.__call__).parameters.items())[1:])
    return Candidate(kind.__name__, options, components, scheduler, str(config.get("variance_type")))


def find_cause(kind: type[Any], components: Sequence[str], scheduler: str, config: Mapping[str, Any]) -> str | None:
    """Return why a pipeline is not made to draw images from text, or cannot be trained; None if nothing shows it."""
    candidate, name = describe(kind, components, scheduler, config), kind.__name__
    sentence = find_sentence(candidate)
    if sentence is None:
        return None
    plain = name_plain(name) if "{plain}" in sentence else ""
    return sentence.format(
        scheduler=scheduler, script=name_script(name), unknown=", ".join(candidate.unknown), plain=plain
    )
