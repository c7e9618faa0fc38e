"""Preview prompts as they are drawn: their settings, with the base model's defaults for those that are not given."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from library.base.errors import UserError
from library.options.output.prompts import REFERENCES, PromptSpec, describe_setting
from library.protocols import Architecture, PromptDefaults
from library.types import Prompt

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 64


def resolve_all(specs: Iterable[PromptSpec], arch: Architecture) -> list[Prompt]:
    defaults, max_references = arch.preview.defaults, arch.codec.spec.max_references
    return [resolve(spec, defaults, arch.inpaints, max_references) for spec in specs]


def resolve(spec: PromptSpec, defaults: PromptDefaults, inpaints: bool = False, max_references: int = 0) -> Prompt:
    """Fill in a prompt's missing settings; warn of settings without effect.

    Raises UserError for an inpainting model without an image, for missing image files, and for more than
    `max_references` reference images.
    """
    if spec.controlnet_image is not None:
        logger.warning(
            "%s: %s is ignored, because no ControlNet is loaded in adapter training",
            spec.place,
            describe_setting("controlnet_image"),
        )
    scale = defaults.scale if spec.scale is None else spec.scale
    if scale <= 1 and spec.negative_prompt:
        logger.warning(
            "%s: %s has no effect at %s %g, which is no guidance; give a scale above 1, or remove it",
            spec.place, describe_setting("negative_prompt"), describe_setting("scale"), scale,
        )  # fmt: skip
    return Prompt(
        text=spec.prompt,
        negative=spec.negative_prompt or "",
        width=round_side(spec.width or defaults.width, defaults.size_step, spec.place),
        height=round_side(spec.height or defaults.height, defaults.size_step, spec.place),
        seed=spec.seed,
        num_steps=spec.sample_steps or defaults.num_steps,
        scale=scale,
        sampler=take_setting(spec, "sample_sampler", defaults.sampler),
        guidance_scale=take_setting(spec, "guidance_scale", defaults.guidance_scale),
        cfg_trunc_ratio=take_setting(spec, "cfg_trunc_ratio", defaults.cfg_trunc_ratio),
        renorm_cfg=take_setting(spec, "renorm_cfg", defaults.renorm_cfg),
        flow_shift=take_setting(spec, "flow_shift", defaults.flow_shift),
        image_path=read_inpainted_image(spec) if inpaints else take_setting(spec, "image_path", None),
        reference_paths=read_references(spec, max_references),
        strength=1.0 if spec.strength is None else spec.strength,
    )


def refuse_strengths(specs: Sequence[PromptSpec], flag: str) -> None:
    """Raise UserError for a prompt with a strength if a tool's `flag` sets the strengths of all."""
    for spec in specs:
        if spec.strength is not None:
            raise UserError(
                f"{spec.place}: remove {describe_setting('strength')}; {flag} sets the strengths of all prompts"
            )


def read_inpainted_image(spec: PromptSpec) -> Path:
    if spec.image_path is None:
        raise UserError(
            f"{spec.place} has no image to inpaint",
            f"give one with {describe_setting('image_path')}: its transparent part is painted, or a random part if "
            "nothing is transparent",
        )
    return require_file(Path(spec.image_path), "image_path", spec.place)


def require_file(path: Path, key: str, place: str) -> Path:
    """Return the path. Raises UserError if there is no file."""
    if not path.is_file():
        raise UserError(f"{place}: {describe_setting(key)} is {path}, but there is no such file")
    return path


def read_references(spec: PromptSpec, max_references: int) -> tuple[Path, ...]:
    """Return a prompt's reference images; none, with a warning, for a model without them."""
    paths = spec.control_image_path or ()
    if paths and not max_references:
        take_setting(spec, REFERENCES, None)
        return ()
    if len(paths) > max_references:
        raise UserError(
            f"{spec.place}: {describe_setting(REFERENCES)} names {len(paths)} images, but this base model takes at "
            f"most {max_references}"
        )
    return tuple(require_file(Path(path), REFERENCES, spec.place) for path in paths)


def round_side(wanted: int, step: int, place: str) -> int:
    """Return an image side that the base model supports: a multiple of `step`, at least 64."""
    # sd-scripts rounds down too, with the same smallest side.
    rounded = max(SMALLEST_SIDE, wanted - wanted % step)
    if rounded != wanted:
        logger.info("%s: a side of %d is drawn as %d, a multiple of %d", place, wanted, rounded, step)
    return rounded


def take_setting(spec: PromptSpec, key: str, default: Any) -> Any:
    """Return a prompt's setting, or the default with a warning if the base model does not support it."""
    value = getattr(spec, key)
    if default is None and value is not None:
        logger.warning("%s: %s has no effect on this base model", spec.place, describe_setting(key))
        return None
    return default if value is None else value
