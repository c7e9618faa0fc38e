"""Adapter files whose modules have other programs' names, brought to the names of this network."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.adapter_keys import PEFT_PREFIX, AdapterKey, path_alone, under
from library.checkpoints.adapter_names import BaseNames, ModuleNames, placed
from library.errors import UserError
from networks.core.changes.adalora import as_lora
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, parse_adapter, read_adapter_file
from networks.core.files.module_weights import ModuleWeights, named_twice
from networks.core.files.renaming import rename


def in_own_names(
    tensors: Mapping[str, Tensor], names: BaseNames | None, file: str | Path, keeps_pieces: bool = False
) -> Mapping[str, Tensor]:
    """The tensors of an adapter file under kohya's names, the strengths that other namings keep elsewhere included.

    `keeps_pieces` as in `rename`. A file that has these names already, or whose base model lists no
    others, comes back as it is. Raises UserError naming the keys that have no place in this base model, or naming a
    module that stands twice.
    """
    tensors = as_lora(tensors, str(file))
    if names is None or not any(is_foreign(module, names) for module in modules_of(tensors)):
        return tensors
    path = Path(file)
    with torch.device("cpu"):  # a training is rehearsed with a network that has no memory, but with the values of files
        read = read_adapter_file(path) if path.exists() else parse_adapter(tensors, {}, str(file))
        return adapter_tensors(rename(in_a_model(read, [names]), names, "kohya", keeps_pieces=keeps_pieces).file)


def modules_of(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The modules of a file, each by every key that it has."""
    return (found.module for key in tensors if (found := AdapterKey.parse(key)) is not None)


def is_foreign(module: str, names: BaseNames) -> bool:
    """Whether a module of this base model has another name than kohya's."""
    found = names.find(module)
    if found is not None:
        return found.kohya != module
    return module.startswith(PEFT_PREFIX) or bool(placed([module], [names]))


def in_a_model(file: AdapterFile, tables: Sequence[BaseNames]) -> AdapterFile:
    """A file whose modules are named without their model, as PEFT, LyCORIS and OneTrainer do, with the names that they
    have in a model of one of `tables`; other modules as they are.

    Raises UserError for a file by PEFT of which none of `tables` knows a module.
    """
    others = placed(file.modules.keys(), tables)
    if not others and all(name.startswith(PEFT_PREFIX) and find_in(tables, name) is None for name in file.modules):
        raise UserError(
            f"{file.origin}: PEFT wrote it for a model that is none of those known here (first module: "
            f"{path_alone(next(iter(file.modules)))}); names of diffusers' and of the original modules are known"
        )
    if not others:
        return file
    modules: dict[str, ModuleWeights] = {}
    for name, module in file.modules.items():
        other = others.get(name, name)
        if other in modules:
            raise named_twice(file.origin, other)
        modules[other] = _renamed(module, other) if other != name else module
    return replace(file, modules=modules)


def find_in(tables: Sequence[BaseNames], name: str) -> ModuleNames | None:
    """The module that a name is of in the first table that knows it."""
    return next((found for table in tables if (found := table.find(name)) is not None), None)


def _renamed(module: ModuleWeights, name: str) -> ModuleWeights:
    """A module and its keys under another name."""
    keys = {leaf: under(name, key, module.name, leaf) for leaf, key in module.keys.items()}
    return replace(module, name=name, keys=keys)
