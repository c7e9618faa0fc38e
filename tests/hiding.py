"""Packages that this process lacks for a test, or that are broken."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

OPTIONAL = (
    "bitsandbytes", "dadaptation", "lion_pytorch", "pillow_heif", "prodigyopt", "pyarrow", "pynvml", "schedulefree",
    "tensorboard", "wandb", "xformers",
)  # fmt: skip
"""The modules of packages that only some options or files need; no command fails without those that it was not asked
for."""


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
