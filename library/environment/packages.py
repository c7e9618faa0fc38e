"""Packages that only some options or models need: which are missing, which are broken, and what to install.

A package is broken if it is installed and its import raises anything, as builds for other versions of torch, CUDA or
NumPy do.
"""

import re
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from library.base.errors import UserError, about, error_in
from library.environment.hidden_libraries import unhide_library
from library.environment.module_names import MODULES, module_of

ROOT = Path(__file__).parents[2]
# transformers and diffusers name packages that they look for by metadata, and raise a bare ImportError.
LACKS = re.compile(r"(?:requires the |^`)(\w[\w.-]*)(?: library but it was not found|` is not installed)")


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_missing(module: str) -> bool:
    """Return True if a module cannot be found. Imports nothing, not even the package of a submodule."""
    root = module.partition(".")[0]
    try:
        return find_spec(root) is None
    except ModuleNotFoundError as error:  # of an importer, which may itself lack something
        return error.name == root
    except ImportError:
        return False
    except ValueError:  # it is in `sys.modules` without a spec, such as a program's own module or a hidden one
        return sys.modules[root] is None


def pip_name_of(root: str) -> str:
    """Return pip's name of the package that has a top-level module, which may be missing."""
    return next((name for name, module in MODULES.items() if module == root), root.replace("_", "-"))


def list_lacks(*packages: str) -> list[str]:
    """Return those of the packages that are not installed."""
    return [name for name in packages if version_of(name) is None or is_missing(module_of(name))]


def describe_lack(*packages: str) -> str:
    """Return that packages are not installed, with pip's command."""
    names = " ".join(packages)
    verb = "is" if len(packages) == 1 else "are"
    return f"needs the package{'s' * (len(packages) > 1)} {names}, which {verb} not installed: pip install {names}"


def import_needed(module: str, setting: str | None, value: str = "", otherwise: str = "") -> Any:
    """Import a module that a setting needs. Raises UserError if its package is missing or broken, saying what to
    install; `otherwise` is what may be set in its place."""
    root = module.partition(".")[0]
    unhide_library(root)
    if is_missing(root):
        reason = f"{value} {describe_lack(pip_name_of(root))}{otherwise}"
        raise about(setting, cause="not installed")(reason.lstrip())
    try:
        return import_module(module)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        is_absent = f"{module}.".startswith(f"{absent}.")
        fault = f"there is no module {absent}; check the path" if is_absent else describe_broken(root, error)
        raise about(setting, cause="not installed")(f"{value}: {fault}{otherwise}") from error


def describe_broken(root: str, error: BaseException) -> str:
    """Return what is wrong with a package that raises `error` when it is imported, and pip's command or the file."""
    package = next(iter(metadata.packages_distributions().get(root, ())), pip_name_of(root)).replace("_", "-")
    version = version_of(package)
    named = f"{package} {version}" if version else root
    if (lack := find_missing(error)) is not None:
        return f"{named} {describe_lack(lack)}"
    why = f"{type(error).__name__}: {(str(error).strip() or 'without a message').splitlines()[0]}"
    remedy = "" if version else "mend it, or "  # a module of the user's own
    return f"{named} cannot be imported ({why}); {remedy}install another version: pip install --upgrade {package}"


def describe_fault(error: BaseException) -> str | None:
    """Return which missing or broken package led to an error, and what to install; None if none did."""
    errors = list(causes(error))
    for link in reversed(errors):
        if (package := find_missing(link)) is not None:
            return f"this {describe_lack(package)}"
    for link in reversed(errors):
        if (root := find_broken(link.__traceback__)) is not None:
            return describe_broken(root, link)
    return None


def explain_fault(error: Exception) -> Exception:
    """Return the UserError of an error that a missing or broken package led to, and any other error itself."""
    fault = None if isinstance(error, UserError) else describe_fault(error)
    return error if fault is None else error_in(cause="not installed")(fault)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the one that it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def find_missing(error: BaseException) -> str | None:
    """Return pip's name of the package that an ImportError is about, if it is missing."""
    if not isinstance(error, ImportError):
        return None
    named = LACKS.search(str(error))
    if named is not None and named[1] != "PyTorch" and list_lacks(named[1].lower()):
        return named[1].lower()
    root = (error.name or "").partition(".")[0]
    is_lack = isinstance(error, ModuleNotFoundError) and root and root not in sys.stdlib_module_names
    return pip_name_of(root) if is_lack and is_missing(root) else None


def find_broken(traceback: TracebackType | None) -> str | None:
    """Return the installed package whose own code was being imported last where an error was raised."""
    root = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_name == "<module>":
            is_ours = ROOT in Path(code.co_filename).parents and "site-packages" not in code.co_filename
            name = str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0]
            root = None if is_ours or name in sys.stdlib_module_names else name
        traceback = traceback.tb_next
    return root if root and root in metadata.packages_distributions() else None
