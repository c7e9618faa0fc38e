"""Errors for files without read permission name the option.

The permission error is simulated, because root may read everything.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.base.errors import UserError
from library.checkpoints import model_lookup, weights
from library.data.description.dataset_file import load_dataset_config
from library.data.sources.folders.metadata_file import read_metadata
from library.options.config_file import read_toml
from library.options.output.prompts import read_prompts
from tests.unit.data.builders import options_of

READERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "config file": ("a.toml", lambda path: read_toml(path, "--config_file"), "--config_file"),
    "dataset": (
        "a.json",
        lambda path: load_dataset_config(options_of("--dataset_config", str(path))),
        "--dataset_config",
    ),
    "metadata": ("a.json", lambda path: list(read_metadata(str(path))), "metadata_file"),
    "prompts": ("a.txt", read_prompts, "--sample_prompts"),
    "base model": ("a.safetensors", lambda path: model_lookup.open_file("--vae", path), "--vae"),
}


@pytest.mark.parametrize("name", READERS)
def test_the_error_for_an_unreadable_file_names_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, read, flag = READERS[name]
    path = tmp_path / file
    path.write_text("{}")

    def refuse(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(weights, "require_weight_file", refuse)
    monkeypatch.setattr("library.data.sources.folders.metadata_file.open", refuse, raising=False)
    with pytest.raises(UserError, match=rf"{flag} .*{file} cannot be read: Permission denied; change its permissions"):
        read(path)
