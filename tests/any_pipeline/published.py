"""The models of published.toml, and tiny random pipelines with their schedulers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tomllib

from tests.any_pipeline.any_class import build_parts
from tests.hiding import lazily
from tests.running import ROOT
from tests.tiny.more_pipelines import MORE
from tests.tiny.pipeline_parts import replace_ftfy
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline

diffusers = lazily("diffusers")

UNKNOWN = "?"


@dataclass(frozen=True)
class Published:
    """A published model, or several that share a scheduler, as published.toml has it."""

    pipelines: tuple[str, ...]
    name: str
    scheduler: str  # its class
    config: Mapping[str, Any]
    text_encoders: str
    size: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # other arguments of the pipeline
    refused: str = ""  # the beginning of the sentence that refuses it

    def build_scheduler(self) -> Any:
        return getattr(diffusers, self.scheduler).from_config(self.config)


def read_models() -> tuple[Published, ...]:
    text = (ROOT / "tests" / "any_pipeline" / "published.toml").read_text(encoding="utf-8")
    return tuple(Published(**{**row, "pipelines": tuple(row["pipelines"])}) for row in tomllib.loads(text)["model"])


MODELS = read_models()


def build_published(model: Published, name: str) -> Any:
    """Build a tiny pipeline of class `name` with the scheduler of a model, if that is known."""
    kind = getattr(diffusers, name)
    replace_ftfy(kind.__module__.removeprefix("diffusers.pipelines."))
    builder: Callable[[], dict[str, Any]] = {**PIPELINES, **MORE}.get(name) or (lambda: build_parts(kind))
    scheduler = {} if model.scheduler == UNKNOWN else {"scheduler": model.build_scheduler()}
    pipe = build_tiny_pipeline(name, builder=lambda: {**builder(), **scheduler})
    pipe.register_to_config(**model.settings)
    return pipe


def find_model(name: str) -> Published:
    """Return the first model of a pipeline's class."""
    return next(model for model in MODELS if name in model.pipelines)
