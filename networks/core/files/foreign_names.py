"""Conversion of adapter files with other programs' module names to the names of this network."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from library.checkpoints.adapter_keys import PEFT_PREFIX, bare_path, replace_module
from library.checkpoints.adapter_names import BaseNames, add_missing_prefixes
from library.errors import UserError
from networks.core.changes import qkv_rows
from networks.core.files.adapter_file import AdapterFile, complete_file
from networks.core.files.module_weights import ModuleWeights, make_name_error
from networks.core.files.renaming import rename
from networks.core.kinds import lora


def to_own_names(file: AdapterFile, names: BaseNames | None, keeps_pieces: bool = False) -> AdapterFile:
    """Return an adapter file under kohya's names, with the scales that other namings record elsewhere.

    `keeps_pieces` is as in `rename`. A file that already has these names, or whose base model defines no others, is
    returned unchanged. Raises UserError for keys that this base model does not have, or for a module that occurs twice.
    """
    if names is None or not any(is_foreign(name, names) for name in file.modules):
        return file
    with torch.device("cpu"):  # the network may be built on the meta device, but a file has values
        return rename(add_model(complete_file(file), [names]), names, "kohya", keeps_pieces=keeps_pieces).file


def is_foreign(module: str, names: BaseNames) -> bool:
    """Return True if a module of this base model has a name other than kohya's."""
    entry = names.find(module)
    if entry is not None:
        return entry.kohya != module
    return module.startswith(PEFT_PREFIX) or bool(names.find_parts(module) or add_missing_prefixes([module], [names]))


def add_model(file: AdapterFile, tables: Sequence[BaseNames]) -> AdapterFile:
    """Return a file with full module names, if its names omit the sub-model, as in PEFT, LyCORIS and OneTrainer.

    Modules of a base model in `tables` get its names; others are unchanged. Raises UserError for a PEFT file of which
    `tables` contains no module, and for a module that occurs twice.
    """
    full_names = add_missing_prefixes(file.modules.keys(), tables)
    # PEFT's names do not say which model they belong to, so at least one of them must fit a base model.
    known = (n for n in file.modules if not n.startswith(PEFT_PREFIX) or any(table.find(n) for table in tables))
    if not full_names and next(known, None) is None:
        raise UserError(
            f"{file.origin}: PEFT wrote it for a model that is none of those known here (first module: "
            f"{bare_path(next(iter(file.modules)))}); names of diffusers' and of the original modules are known"
        )
    modules: dict[str, ModuleWeights] = {}
    for name, module in file.modules.items():
        full_name = full_names.get(name, name)
        for part in split_fused(_rename(module, full_name) if full_name != name else module, tables, file.origin):
            if part.name in modules:
                raise make_name_error(file.origin, part.name)
            modules[part.name] = part
    return replace(file, modules=modules)


def split_fused(module: ModuleWeights, tables: Sequence[BaseNames], origin: str) -> list[ModuleWeights]:
    """Return the parts of a layer that other programs fuse, under kohya's names; [module] for any other.

    Raises UserError for one that is no LoRA, plain or with magnitudes per output.
    """
    parts = next((entries for table in tables if (entries := table.find_parts(module.name))), ())
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
            tensors={**module.tensors, **qkv_rows.take_rows(module.tensors, slice(i * num_rows, (i + 1) * num_rows))},
            keys={key: f"{part.kohya}.{key}" for key in module.tensors},
        )
        for i, part in enumerate(parts)
    ]


def _rename(module: ModuleWeights, name: str) -> ModuleWeights:
    """Return a module and its keys under another name."""
    keys = {
        parameter_key: replace_module(name, key, module.name, parameter_key)
        for parameter_key, key in module.keys.items()
    }
    return replace(module, name=name, keys=keys)
