"""Conversion of adapter files with other programs' module names to the names of this network."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from library.base.errors import UserError
from library.checkpoints.adapter_keys import PEFT_PREFIX, bare_path, replace_module
from library.checkpoints.adapter_names import BaseNames, FileNaming, add_missing_prefixes, have_own_names
from networks.core.changes import qkv_rows
from networks.core.files.adapter_file import AdapterFile, complete_file
from networks.core.files.module_weights import ModuleWeights, make_name_error
from networks.core.files.renaming import rename
from networks.core.kinds import lora

logger = logging.getLogger(__name__)


def to_own_names(file: AdapterFile, names: BaseNames | None, keeps_pieces: bool = False) -> AdapterFile:
    """Return an adapter file under kohya's names, with the scales that other namings record elsewhere.

    `keeps_pieces` is as in `rename`. A file that already has these names, or whose base model defines no others, is
    returned unchanged. Raises UserError for keys that this base model does not have, or for a module that occurs twice.
    """
    file = from_published(file, None if names is None else names.published)
    if names is None or not any(is_foreign(name, names) for name in file.modules):
        return file
    return convert(file, names, "kohya", keeps_pieces)


def convert(file: AdapterFile, names: BaseNames, to: FileNaming, keeps_pieces: bool = False) -> AdapterFile:
    """Return a file in the naming `to`; `keeps_pieces` and the errors are those of `rename`."""
    with torch.device("cpu"):  # the network may be built on the meta device, but a file has values
        whole = split_fused(add_model(complete_file(file), [names]), names)
        return rename(whole, names, to, keeps_pieces=keeps_pieces).file


def from_published(file: AdapterFile, published: BaseNames | None) -> AdapterFile:
    """Return a file with the names of the model's publisher under those of diffusers; any other file unchanged.

    Raises UserError for a module that occurs twice, and for a kind that cannot be joined or split where diffusers has
    other layers.
    """
    if published is None or not any(have_own_names(file.modules, published)):
        return file
    renamed = convert(file, published, "diffusers")
    logger.info("%s: converted from the names of the model's publisher to those of diffusers", file.origin)
    return renamed


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
    renamed = (_rename(module, full_names.get(name, name)) for name, module in file.modules.items())
    return replace(file, modules=index_by_name(renamed, file.origin))


def split_fused(file: AdapterFile, names: BaseNames) -> AdapterFile:
    """Return an adapter file of the base model `names` with the parts of layers that other programs fuse.

    The base model must be known: another one may have the fused layer itself. Raises UserError for a fused layer that
    is no LoRA, plain or with magnitudes per output, and for a module that occurs twice.
    """
    parts = (part for module in file.modules.values() for part in _split(module, names, file.origin))
    return replace(file, modules=index_by_name(parts, file.origin))


def index_by_name(modules: Iterable[ModuleWeights], origin: str) -> dict[str, ModuleWeights]:
    """Return modules by name. Raises UserError for one that occurs twice."""
    indexed: dict[str, ModuleWeights] = {}
    for module in modules:
        if module.name in indexed:
            raise make_name_error(origin, module.name)
        indexed[module.name] = module
    return indexed


def _split(module: ModuleWeights, names: BaseNames, origin: str) -> list[ModuleWeights]:
    """Return the parts of a fused layer under kohya's names; [module] for any other."""
    parts = names.find_parts(module.name)
    if not parts:
        return [module]
    can_split = module.layout is lora.LAYOUT and (module.is_dora_per_output or not module.is_dora)
    if not can_split or qkv_rows.num_rows(module.tensors) % len(parts):
        raise UserError(
            f"{origin}: {module.name} is {len(parts)} layers in this base model, and its "
            f"{'DoRA' if module.is_dora else module.layout.words} cannot be split",
            "leave this layer out",
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
    """Return a module and its keys under another name, or the same."""
    if name == module.name:
        return module
    keys = {
        parameter_key: replace_module(name, key, module.name, parameter_key)
        for parameter_key, key in module.keys.items()
    }
    return replace(module, name=name, keys=keys)
