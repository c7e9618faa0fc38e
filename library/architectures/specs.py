"""The specs of all base models, found by listing the packages next to this file."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from library.checkpoints.base_model_spec import ArgumentForm, BaseModelSpec
from library.checkpoints.model_lookup import find_model
from library.models.identify import base_of_checkpoint


def list_specs() -> tuple[BaseModelSpec, ...]:
    """List the spec of every base model, in the order of package names.

    Scripts, tools and the packages' loaders pass the list on.
    """
    packages = pkgutil.iter_modules([str(Path(__file__).parent)], "library.architectures.")
    return tuple(spec for p in packages if p.ispkg for spec in importlib.import_module(f"{p.name}.spec").SPECS)


def list_network_arguments() -> Mapping[str, ArgumentForm]:
    """List every `network_args` key specific to some base model, with the form of its value."""
    return {name: form for spec in list_specs() for name, form in spec.network_arguments.items()}


def recognise_base_model(flag: str, name: str) -> BaseModelSpec:
    """Return the base model of a file, a diffusers folder or a hub repository; of a repository the denoiser is
    downloaded.

    Raises UserError naming `flag` if it is missing, or of no supported model.
    """
    path = find_model(flag, name, (("unet", "transformer"),))
    return base_of_checkpoint(list_specs(), flag, path)
