"""Options of the scripts that train concepts from prompts alone (LECO)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from library.options.base import Options, group, is_group, redeclare
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.flow import FlowPredictionOptions
from library.options.training.network import NetworkOptions, train_denoiser_alone

WITHOUT_IMAGES = "prompts are trained alone, without images"


@dataclass(frozen=True)
class LecoNetworkOptions(NetworkOptions):
    """The adapter and its learning rates."""

    network_module: str | None = redeclare(NetworkOptions, "network_module", "networks.lora")
    network_dim: int | None = redeclare(NetworkOptions, "network_dim", 4)


@dataclass(frozen=True)
class PromptTraining(Options):
    """The options that prompt training adds to those of a base model, or declares with other defaults."""

    network: LecoNetworkOptions = group(LecoNetworkOptions)
    leco: ConceptOptions = group(ConceptOptions)

    @property
    def concepts(self) -> ConceptOptions:
        return self.leco

    def implied(self) -> Mapping[str, Any]:
        """Train only the denoiser; there is no initial epoch."""
        return {**super().implied(), **train_denoiser_alone(self.network), "skip_until_initial_step": True}


@dataclass(frozen=True)
class LecoOptions(PromptTraining, TrainOptions):
    """The options of train_leco.py, for a base model whose script has only the common options."""


def restore(kind: Any, values: Mapping[str, Any]) -> Options:
    return leco_options(kind)(**values)


def leco_options(kind: type[TrainOptions]) -> type[TrainOptions]:
    """Return the options class for training a base model on prompts, derived from the options of its training script.

    If the base model has --model_prediction_type, it defaults to `raw`, the denoiser's own output, which LECO trains.
    """
    if kind is TrainOptions:
        return LecoOptions
    hints = get_type_hints(kind)
    prediction_groups = [
        name for name, hint in hints.items() if is_group(hint) and issubclass(hint, FlowPredictionOptions)
    ]
    namespace = {
        "__doc__": "All options of training by prompts for one base model.",
        "__module__": kind.__module__,
        "__annotations__": dict.fromkeys(prediction_groups, FlowPredictionOptions),
        **{name: group(FlowPredictionOptions) for name in prediction_groups},
        # A sweep sends options to a process of its own, which has no module with this class.
        "__reduce__": lambda self: (restore, (kind, {f.name: getattr(self, f.name) for f in fields(self)})),
    }
    options_class = type(kind.__name__.replace("Options", "LecoOptions"), (PromptTraining, kind), namespace)
    return dataclass(frozen=True)(options_class)


def list_refused_by_leco(kind: type[Options]) -> dict[str, str]:
    """Return the options that prompt training refuses, each with the reason and the fix."""
    return {
        name: declared.refused_by_leco for name, declared in kind.declarations().items() if declared.refused_by_leco
    }


def list_ignored_by_leco(kind: type[Options]) -> dict[str, str]:
    """Return the options without effect on prompt training, each with the reason."""
    return {
        name: declared.ignored_by_leco or WITHOUT_IMAGES
        for name, declared in kind.declarations().items()
        if declared.ignored_by_leco or declared.needs_images
    }
