"""Checks, before anything is loaded, of a run that trains on prompts without images."""

from collections.abc import Mapping
from pathlib import Path

from library.data.concepts.prompts_file import FLAG, read_prompt_pairs
from library.errors import UserError
from library.options.base import Options
from library.options.leco import ignored_by_leco, refused_by_leco
from library.options.no_effect import asks
from library.options.training.concepts import ConceptOptions


def check_concepts(options: Options, concepts: ConceptOptions) -> None:
    """Raise UserError for options that need images, and for mistakes in the prompts file."""
    values = options.flat()
    for name, why in refused_by_leco(type(options)).items():
        if asks(values[name]):
            raise UserError(f"--{name} does not work with {FLAG}: {why}")
    if not concepts.prompts_file:
        raise UserError(f"{FLAG} is not set; give the TOML file with the prompts that are trained")
    read_prompt_pairs(Path(concepts.prompts_file), warn=ignore_message)


def ignore_message(*message: object) -> None:
    """Say nothing: the run warns of the same where it opens the file."""


def ignored_for_concepts(kind: type[Options], draws_previews: bool) -> Mapping[str, str]:
    """Return the options that have no effect without images, each with the reason."""
    ignored = ignored_by_leco(kind)
    if draws_previews:
        return ignored
    return {**ignored, **dict.fromkeys(("vae", "no_half_vae"), "images are neither encoded nor drawn")}
