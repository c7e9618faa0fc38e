"""The specs of all base models, by listing the packages beside this file."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from library.checkpoints.base_model_spec import ArgumentForm, BaseModelSpec


def list_specs() -> tuple[BaseModelSpec, ...]:
    """The spec of every base model, packages by name. Scripts, tools and the packages' loaders hand it on."""
    packages = pkgutil.iter_modules([str(Path(__file__).parent)], "library.architectures.")
    return tuple(spec for p in packages if p.ispkg for spec in importlib.import_module(f"{p.name}.spec").SPECS)


def list_network_arguments() -> Mapping[str, ArgumentForm]:
    """Every --network_args that means something for some base model, and how its value is written."""
    return {name: form for spec in list_specs() for name, form in spec.network_arguments.items()}
