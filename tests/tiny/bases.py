"""Every base model that this folder has facts of, for the suites that run all of them."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module

import tests.tiny
from tests.tiny.base import Base


def list_bases() -> tuple[Base, ...]:
    """List the base models of every module of this folder, in the order of module names."""
    modules = [import_module(f"tests.tiny.{module.name}") for module in pkgutil.iter_modules(tests.tiny.__path__)]
    return tuple(base for module in modules for base in vars(module).get("BASES", ()) if isinstance(base, Base))


BASES: Mapping[str, Base] = {base.name: base for base in list_bases()}
