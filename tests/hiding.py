"""Packages that a test needs, and packages that this process lacks for a test, or that are broken."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

OPTIONAL = (
    "bitsandbytes", "dadaptation", "datasets", "lion_pytorch", "pillow_heif", "prodigyopt", "pyarrow", "pynvml",
    "schedulefree", "tensorboard", "wandb", "xformers",
)  # fmt: skip
"""The modules of packages that only some options or files need; no command fails without those that it was not asked
for."""


class LazyModule:
    """A module that is imported when one of its attributes is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks for its marks at every name of a file
            raise AttributeError(attribute)
        return getattr(import_module(self._name), attribute)


def lazily(name: str) -> Any:
    """Return a module that is imported when it is first used, as importing it takes seconds that every collection of
    tests would wait for. Skip the tests of the calling file if its package is not installed."""
    if find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return LazyModule(name)


def hide(module: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Let this process lack a package; with `error`, let it be installed and raise that when it is imported."""

    class Finder:
        @staticmethod
        def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if fullname.split(".")[0] != module:
                return None
            if error is None:
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=module)
            return ModuleSpec(fullname, Broken())

    class Broken:
        @staticmethod
        def create_module(spec: Any) -> None: ...

        @staticmethod
        def exec_module(loaded: ModuleType) -> None:
            assert error is not None
            raise error

    for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
