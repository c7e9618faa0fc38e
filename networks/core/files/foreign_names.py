"""Adapter files whose modules have other programs' names, brought to the names of this network."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.checkpoints.adapter_keys import AdapterKey
from library.checkpoints.adapter_names import BaseNames
from networks.core.files.adapter_file import adapter_tensors, parse_adapter, read_adapter_file
from networks.core.files.renaming import rename


def in_own_names(tensors: Mapping[str, Tensor], names: BaseNames | None, file: str | Path) -> Mapping[str, Tensor]:
    """The tensors of an adapter file under kohya's names, the strengths that other namings keep elsewhere included.

    A file that has these names already, or whose base model lists no others, comes back as it is. Raises UserError
    naming the keys that have no place in this base model, or naming a module that stands twice.
    """
    if names is None or not any(is_foreign(key, names) for key in tensors):
        return tensors
    path = Path(file)
    read = read_adapter_file(path) if path.is_file() else parse_adapter(tensors, {}, str(file))
    return adapter_tensors(rename(read, names, "kohya").file)


def is_foreign(key: str, names: BaseNames) -> bool:
    """Whether a key is of a module of this base model under another name than kohya's."""
    found = AdapterKey.parse(key)
    module = names.find(found.module) if found else None
    return module is not None and found is not None and module.kohya != found.module
