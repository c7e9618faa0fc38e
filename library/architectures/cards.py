"""The cards of all base models, by listing the packages beside this file."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from library.checkpoints.model_card import ArgumentForm, ModelCard


def list_cards() -> tuple[ModelCard, ...]:
    """The card of every base model, packages by name. Scripts, tools and the packages' loaders hand it on."""
    packages = pkgutil.iter_modules([str(Path(__file__).parent)], "library.architectures.")
    return tuple(card for p in packages if p.ispkg for card in importlib.import_module(f"{p.name}.card").CARDS)


def list_network_arguments() -> Mapping[str, ArgumentForm]:
    """Every --network_args that means something for some base model, and how its value is written."""
    return {name: form for card in list_cards() for name, form in card.network_arguments.items()}
