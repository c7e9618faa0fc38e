"""Import of Python files that a model brings, once the user trusts them."""

import atexit
import importlib
import logging
import shutil
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
RUNS = "--trust_remote_code runs %s, which has all rights that you have"


def import_own_class(file: Path, name: str) -> Any:
    """Run a file, with those beside it that it imports, and return its attribute `name`; None if it has none.

    Each folder is a package of its own, so files of two components may have the same names.
    """
    logger.warning(RUNS, file)
    folder = file.parent.resolve()
    package = f"model_code_{blake2b(str(folder).encode(), digest_size=8).hexdigest()}"
    for known in [module for module in sys.modules if module.partition(".")[0] == package]:
        del sys.modules[known]  # the files may have changed
    parent = ModuleType(package)
    parent.__path__ = [str(copy_sources(folder))]
    sys.modules[package] = parent
    module = importlib.import_module(f"{package}.{file.stem}")
    for other in [one for one in sys.modules if one.startswith(f"{package}.") and one != module.__name__]:
        logger.warning(RUNS, folder.joinpath(*other.split(".")[1:]).with_suffix(".py"))
    return getattr(module, name, None)


def copy_sources(folder: Path) -> Path:
    """Return a copy of a folder's Python files that lasts as long as this process.

    Beside a file that the user has read, compiled code could be run in its place.
    """
    copy = Path(tempfile.mkdtemp(prefix="model_code_"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for source in folder.rglob("*.py"):
        target = copy / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return copy
