"""The options of the scripts that train concepts by prompts alone (LECO)."""

import argparse
from dataclasses import dataclass
from typing import TypeVar, get_type_hints

from library.options.base import Options, group, is_group, redeclared
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.flow import FlowPredictionOptions
from library.options.training.network import NetworkOptions

OptionsT = TypeVar("OptionsT", bound="PromptTraining")

WITHOUT_IMAGES = "prompts are trained alone, without images"


@dataclass(frozen=True)
class LecoNetworkOptions(NetworkOptions):
    """The adapter and its learning rates."""

    network_module: str | None = redeclared(NetworkOptions, "network_module", "networks.lora")
    network_dim: int | None = redeclared(NetworkOptions, "network_dim", 4)


@dataclass(frozen=True)
class PromptTraining(Options):
    """The options that training by prompts adds to those of a base model, or declares with other defaults."""

    network: LecoNetworkOptions = group(LecoNetworkOptions)
    leco: ConceptOptions = group(ConceptOptions)

    @property
    def concepts(self) -> ConceptOptions:
        return self.leco

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Collect the parsed values. Only the denoiser is ever trained; there is no epoch that a run could begin with.

        Who asks for the text encoders alone is refused later, with a reason.
        """
        options = super().from_args(args)
        trains_denoiser = not options.network.network_train_text_encoder_only
        return options.with_values({"network_train_unet_only": trains_denoiser, "skip_until_initial_step": True})


@dataclass(frozen=True)
class LecoOptions(PromptTraining, TrainOptions):
    """All options of train_leco.py for the base model whose script has only the common options."""


def leco_options(kind: type[TrainOptions]) -> type[TrainOptions]:
    """Return the options of training a base model by prompts, from those of its script for images.

    Where the form of the prediction is an option, it is the denoiser's own output, which is what LECO trains.
    """
    if kind is TrainOptions:
        return LecoOptions
    hints = get_type_hints(kind)
    forms = [name for name, hint in hints.items() if is_group(hint) and issubclass(hint, FlowPredictionOptions)]
    namespace = {
        "__doc__": "All options of training by prompts for one base model.",
        "__module__": kind.__module__,
        "__annotations__": dict.fromkeys(forms, FlowPredictionOptions),
        **{name: group(FlowPredictionOptions) for name in forms},
    }
    made = type(kind.__name__.replace("Options", "LecoOptions"), (PromptTraining, kind), namespace)
    return dataclass(frozen=True)(made)


def refused_by_leco(kind: type[Options]) -> dict[str, str]:
    """Return the options that prompts cannot be trained with, each with the reason and what to do."""
    return {name: facts.refused_by_leco for name, facts in kind.facts().items() if facts.refused_by_leco}


def ignored_by_leco(kind: type[Options]) -> dict[str, str]:
    """Return the options that have no effect where prompts are trained without images, each with the reason."""
    return {
        name: facts.ignored_by_leco or WITHOUT_IMAGES
        for name, facts in kind.facts().items()
        if facts.ignored_by_leco or facts.needs_images
    }
