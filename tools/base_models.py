"""Checkpoints of every base model that adapters can be merged into, opened by what they are."""

from collections.abc import Callable, Mapping
from pathlib import Path

from library.architectures.flux import base_model as flux
from library.architectures.sd import base_model as sd
from library.checkpoints import sources
from library.checkpoints.base_model import BaseModel
from library.models.recognise import base_of_file, pipeline_base

OPENERS: Mapping[str, Callable[[str, Path], BaseModel]] = {"flux": flux.open_base_model}


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file or a diffusers folder; of the files only headers are read.

    Raises ValueError naming `flag` when it is missing, broken or of a kind that nothing is merged into.
    """
    base = None
    if path.is_dir():
        base = pipeline_base(sources.read_json(path / "model_index.json").get("_class_name", ""))
    elif path.is_file():
        weights = sources.open_file(flag, path)
        base = base_of_file(list(weights.shapes), weights.shapes)
    return OPENERS.get(base or "", sd.open_base_model)(flag, path)
