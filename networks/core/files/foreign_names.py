"""Adapter files whose modules have other programs' names, brought to the names of this network."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from library.checkpoints.adapter_keys import PEFT_PREFIX, bare_path, under
from library.checkpoints.adapter_names import BaseNames, placed
from library.errors import UserError
from networks.core.changes import qkv_rows
from networks.core.files.adapter_file import AdapterFile, completed
from networks.core.files.module_weights import ModuleWeights, named_twice
from networks.core.files.renaming import rename
from networks.core.kinds import lora


def in_own_names(file: AdapterFile, names: BaseNames | None, keeps_pieces: bool = False) -> AdapterFile:
    """Return an adapter file under kohya's names, the strengths that other namings keep elsewhere included.

    `keeps_pieces` as in `rename`. A file that has these names already, or whose base model lists no others, comes back
    as it is. Raises UserError naming the keys that have no place in this base model, or naming a module that stands
    twice.
    """
    if names is None or not any(is_foreign(name, names) for name in file.modules):
        return file
    with torch.device("cpu"):  # a training is rehearsed with a network that has no memory, but with the values of files
        return rename(in_a_model(completed(file), [names]), names, "kohya", keeps_pieces=keeps_pieces).file


def is_foreign(module: str, names: BaseNames) -> bool:
    """Return True if a module of this base model has another name than kohya's."""
    found = names.find(module)
    if found is not None:
        return found.kohya != module
    return module.startswith(PEFT_PREFIX) or bool(names.find_parts(module) or placed([module], [names]))


def in_a_model(file: AdapterFile, tables: Sequence[BaseNames]) -> AdapterFile:
    """Return a file whose modules are named without their model, as PEFT, LyCORIS and OneTrainer do, with full names.

    These are those that they have in a model of one of `tables`; other modules stay as they are. A layer that is
    several in that model is split.

    Raises UserError for a file by PEFT of which none of `tables` knows a module, and for a layer that cannot be split.
    """
    others = placed(file.modules.keys(), tables)
    known = (n for n in file.modules if not n.startswith(PEFT_PREFIX) or any(table.find(n) for table in tables))
    if not others and next(known, None) is None:
        raise UserError(
            f"{file.origin}: PEFT wrote it for a model that is none of those known here (first module: "
            f"{bare_path(next(iter(file.modules)))}); names of diffusers' and of the original modules are known"
        )
    modules: dict[str, ModuleWeights] = {}
    for name, module in file.modules.items():
        other = others.get(name, name)
        for part in split_fused(_renamed(module, other) if other != name else module, tables, file.origin):
            if part.name in modules:
                raise named_twice(file.origin, part.name)
            modules[part.name] = part
    return replace(file, modules=modules)


def split_fused(module: ModuleWeights, tables: Sequence[BaseNames], origin: str) -> list[ModuleWeights]:
    """Return the parts of a layer that other programs fuse, under kohya's names; [module] for any other.

    Raises UserError for one that is no LoRA, plain or with magnitudes per output.
    """
    parts = next((found for table in tables if (found := table.find_parts(module.name))), ())
    if not parts:
        return [module]
    can_split = module.layout is lora.LAYOUT and (module.is_dora_per_output or not module.is_dora)
    if not can_split or qkv_rows.num_rows(module.tensors) % len(parts):
        raise UserError(
            f"{origin}: {module.name} is {len(parts)} layers in this base model, and its "
            f"{'DoRA' if module.is_dora else module.layout.words} cannot be split; leave this layer out"
        )
    num_rows = qkv_rows.num_rows(module.tensors) // len(parts)
    return [
        replace(
            module,
            name=part.kohya,
            tensors={
                **module.tensors, **qkv_rows.take_rows(module.tensors, slice(i * num_rows, (i + 1) * num_rows))
            },
            keys={key: f"{part.kohya}.{key}" for key in module.tensors},
        )
        for i, part in enumerate(parts)
    ]  # fmt: skip


def _renamed(module: ModuleWeights, name: str) -> ModuleWeights:
    """Return a module and its keys under another name."""
    keys = {parameter_key: under(name, key, module.name, parameter_key) for parameter_key, key in module.keys.items()}
    return replace(module, name=name, keys=keys)
