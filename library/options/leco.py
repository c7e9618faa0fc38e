"""The options of the scripts that train concepts by prompts alone (LECO)."""

import argparse
from dataclasses import dataclass
from typing import TypeVar

from library.options.base import Options, group, redeclared
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.network import NetworkOptions

OptionsT = TypeVar("OptionsT", bound="LecoOptions")

WITHOUT_IMAGES = "prompts are trained alone, without images"


@dataclass(frozen=True)
class LecoNetworkOptions(NetworkOptions):
    """The adapter and its learning rates."""

    network_module: str | None = redeclared(NetworkOptions, "network_module", "networks.lora")
    network_dim: int | None = redeclared(NetworkOptions, "network_dim", 4)


@dataclass(frozen=True)
class LecoOptions(TrainOptions):
    """All options of train_leco.py."""

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
