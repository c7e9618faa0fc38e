"""Where packages come from, as command line and the user's settings of pip and uv say.

An old Python must be able to parse this file, so annotations are quoted.
"""

import os
import subprocess
from pathlib import Path

PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "constraint", "no-index")
UV_VARIABLES = (
    "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONSTRAINT",
)  # fmt: skip
UV_OPTIONS = {
    "PIP_INDEX_URL": "--index-url", "PIP_EXTRA_INDEX_URL": "--extra-index-url", "PIP_FIND_LINKS": "--find-links",
    "PIP_CONSTRAINT": "--constraint",
}  # fmt: skip


class Source:
    """Where packages come from: a folder of wheels, and a build of torch; None where this machine decides.

    `versions` is the requirements file whose versions the user asks for; None accepts those that are installed, and
    those that the user's settings of pip choose.
    """

    def __init__(self, wheels: "Path | None" = None, torch: "str | None" = None, versions: "str | None" = None) -> None:
        self.wheels, self.torch, self.versions = wheels, torch, versions


def uv_options() -> "list[str]":
    """Return uv's options for pip's variables, which uv does not read."""
    words = [
        word for name, option in UV_OPTIONS.items() for value in os.environ.get(name, "").split()
        for word in (option, value)
    ]  # fmt: skip
    # By default uv takes a package from the first index that has it; pip compares the versions of all indexes.
    return [*words, "--index-strategy", "unsafe-best-match"] if "--extra-index-url" in words else words


def chooses_packages(python: Path) -> bool:
    """Return True if the user's settings say where packages come from, or which versions."""
    variables = ["PIP_" + name.upper().replace("-", "_") for name in PIP_SETTINGS]
    if any(os.environ.get(name) for name in (*variables, *UV_VARIABLES)):
        return True
    command = [str(python), "-m", "pip", "config", "list"]
    settings = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return any(f".{name}=".encode() in settings for name in PIP_SETTINGS)
