"""Adapter files whose modules have other programs' names, brought to the names of this network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from library.checkpoints.adapter_keys import PEFT_PREFIX, AdapterKey, naming_of, without_peft_prefix
from library.checkpoints.adapter_names import BaseNames
from library.errors import UserError
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, parse_adapter, read_adapter_file
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import rename

MODELS_OF_PEFT = (
    "unet.", "transformer.", "diffusion_model.", "text_encoder.", "text_encoder_2.", "text_encoder_3.",
    "text_conditioner.",
)  # fmt: skip


def in_own_names(tensors: Mapping[str, Tensor], names: BaseNames | None, file: str | Path) -> Mapping[str, Tensor]:
    """The tensors of an adapter file under kohya's names, the strengths that other namings keep elsewhere included.

    A file that has these names already, or whose base model lists no others, comes back as it is. Raises UserError
    naming the keys that have no place in this base model, or naming a module that stands twice.
    """
    if names is None or not any(key.startswith(PEFT_PREFIX) or is_foreign(key, names) for key in tensors):
        return tensors
    path = Path(file)
    read = read_adapter_file(path) if path.exists() else parse_adapter(tensors, {}, str(file))
    return adapter_tensors(rename(in_a_model(read, [names]), names, "kohya").file)


def is_foreign(key: str, names: BaseNames) -> bool:
    """Whether a key is of a module of this base model under another name than kohya's."""
    found = AdapterKey.parse(key)
    module = names.find(found.module) if found else None
    return module is not None and found is not None and module.kohya != found.module


def in_a_model(file: AdapterFile, tables: Sequence[BaseNames]) -> AdapterFile:
    """A file that PEFT wrote alone, which names modules after a model that it does not name, with the prefix of the
    model in which all of them are; other files as they are.

    Raises UserError where there is none among `tables`.
    """
    paths = [without_peft_prefix(name) for name in file.modules]
    if not all(name.startswith(PEFT_PREFIX) for name in file.modules) or any(naming_of(p) != "unknown" for p in paths):
        return file
    for prefix in MODELS_OF_PEFT:
        if any(all(names.find(prefix + path) is not None for path in paths) for names in tables):
            modules = {prefix + path: module for path, module in zip(paths, file.modules.values(), strict=True)}
            return replace(file, modules={name: _renamed(module, name) for name, module in modules.items()})
    raise UserError(
        f"{file.origin}: PEFT wrote it for a model that is none of those known here (first module: {paths[0]}); "
        "names of diffusers' and of the original modules are known"
    )


def _renamed(module: ModuleWeights, name: str) -> ModuleWeights:
    """A module and its keys under another name."""
    return replace(module, name=name, keys={leaf: name + key[len(module.name) :] for leaf, key in module.keys.items()})
