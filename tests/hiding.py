"""Packages that this process lacks for a test."""

import sys

import pytest


def hide(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process lack a package."""

    class Missing:
        @staticmethod
        def find_spec(fullname: str, path: object = None, target: object = None) -> None:
            if fullname.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=module)

    for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
