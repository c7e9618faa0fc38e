"""Checks of installed packages against required versions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

from library.errors import UserError

# Older than requirements.txt asks for: front ends pin their own versions, and most base models train with these.
NEEDED_BY_ALL: Mapping[str, str] = {"transformers": ">=4.53", "diffusers": ">=0.32"}


@dataclass(frozen=True)
class Lack:
    """A required package that is missing or has the wrong version."""

    package: str
    found: str | None  # installed version; None if missing
    needed: str  # ">=0.38"

    def __str__(self) -> str:
        return "missing" if self.found is None else f"{self.found} (required: {self.needed})"


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_lack(requirement: str) -> Lack | None:
    """Check the package of a requirement such as "torch>=2.9"; return None if it fits or is not for this Python."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return None
    found = version_of(wanted.name)
    if found is not None and wanted.specifier.contains(found, prereleases=True):
        return None
    return Lack(wanted.name, found, str(wanted.specifier))


def install_command(requirements: Iterable[str]) -> str:
    """Return the command that installs or updates packages."""
    return "python3 -m pip install -U " + " ".join(f'"{requirement}"' for requirement in requirements)


def check_installed(what: str, needed: Mapping[str, str]) -> None:
    """Raise UserError with the fixing command if a package that training `what` needs is missing or too old.

    `needed` are version specifiers by package.
    """
    requirements = [package + specifier for package, specifier in needed.items()]
    lacks = [lack for requirement in requirements if (lack := find_lack(requirement)) is not None]
    if lacks:
        found = "; ".join(f"{lack.package} {lack}" for lack in lacks)
        raise UserError(f"The installed packages cannot train {what}: {found}. Run {install_command(requirements)}")
