"""Base models on the Hugging Face hub: those that the scripts name, and their downloads."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from library.base.errors import error_in

logger = logging.getLogger(__name__)

Say = Callable[..., None]
TIMEOUT_S = 10
NAME = r"[\w.-]+/[\w.-]+"  # owner and model


def list_published() -> list[dict[str, Any]]:
    """Return the files of base models that the training scripts name, with what is known of each."""
    from library.architectures.scripts import list_scripts
    from library.options.model import BASE

    files = dict.fromkeys(file for script in list_scripts() for file in script.files if file.flag == BASE)
    return [
        {"repository": file.repository, "file": file.file, "gigabytes": file.gigabytes, "licence": file.licence or ""}
        for file in files
    ]


def find_logins(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Ask the hub which repositories need a login; those that it does not answer for are left out."""
    from huggingface_hub import HfApi

    found = {}
    for number, name in enumerate(inputs["repositories"]):
        say(done=number, total=len(inputs["repositories"]))
        try:
            found[name] = bool(HfApi().model_info(name, timeout=TIMEOUT_S).gated)
        except Exception as error:  # each network library of the hub client has its own errors
            logger.info("%s: %s", name, error)
    return {"logins": found}


def download(inputs: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Download a file of a repository, or what a training needs of a whole one, and go on after a cut.

    Raises UserError if that fails, naming the login that the hub asks for.
    """
    from library.checkpoints.model_lookup import fetch_snapshot
    from library.train_photos.base import FLAG, recognise

    name, file, bar = inputs["repository"], inputs["file"], make_bar(say)
    if not file:
        return {"base": recognise(name, bar).name}
    try:
        path = fetch_snapshot(name, [file], bar) / file
    except ConnectionError as error:
        raise error_in(FLAG, path=name, cause="unreadable")(f"{FLAG} {name} cannot be downloaded: {error}") from error
    if not path.exists():  # no connection, and only other files of it in the cache
        raise error_in(FLAG, path=name, cause="missing")(f"{FLAG} {name} cannot be reached", "check the connection")
    return {"base": str(path)}


def make_bar(say: Say) -> type[Any]:
    """Return a class of progress bars that says the bytes of all files."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **values: Any) -> None:
            self._counts_bytes, self._num_done = values.get("unit") == "B", values.get("initial") or 0
            super().__init__(*args, **{**values, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self._num_done += n or 0
            if self._counts_bytes and self.total:
                say(done=self._num_done, total=self.total)
            return None

    return Bar
