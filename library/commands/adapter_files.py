"""Reading, recognising and writing of adapter files, for all tools."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from library.architectures.specs import list_specs
from library.base.terminal import print_line
from library.checkpoints.adapter_keys import recognise_naming
from library.checkpoints.adapter_names import BaseNames, name_by_path
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.marks import mark_of
from library.checkpoints.recognition import base_in_metadata, pipeline_in, recognise_adapter, require_spec
from library.commands.base_models import general_spec
from networks.core.files.adapter_file import AdapterFile, read_adapter_file, save_adapter_file
from networks.core.files.foreign_names import add_model, from_published, split_fused
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import to_saved_naming


def read_adapter(path: Path, flag: str) -> AdapterFile:
    """Read an adapter file of any trainer, or a folder saved by PEFT. Raises UserError naming `flag`."""
    file, specs = read_adapter_file(path, flag), list_specs()
    recorded = base_in_metadata(specs, file.metadata)
    if recorded is None and not any(all(map(spec.names.find, file.modules)) for spec in specs):
        general = general_spec()
        if pipeline := general.find_published(file.modules):
            # Diffusers' names, into which it is converted, do not show whose they are.
            file = replace(file, metadata={**file.metadata, "modelspec.architecture": f"{pipeline}/lora"})
            return from_published(file, general.names_of(pipeline, file.modules))
    # Names of a pipeline without a table may look like those of other base models.
    if recorded is not None and recorded.is_general and spec_for_file(file, flag) is recorded:
        return from_published(file, recorded.names_of(pipeline_in(file.metadata), file.modules))
    file = add_model(file, [spec.names for spec in specs])
    spec = recognise_adapter(specs, shapes_by_key(file), file.metadata)
    return file if spec is None else split_fused(file, spec.names)


def spec_for_file(file: AdapterFile, origin: str) -> BaseModelSpec:
    """Return the spec of a file's base model. Raises UserError if it cannot be recognised."""
    return require_spec(list_specs(), shapes_by_key(file), file.metadata, origin)


def shapes_by_key(file: AdapterFile) -> dict[str, torch.Size]:
    """Return the shape of every tensor by its key in the file."""
    return {module.keys[key]: t.shape for module in file.modules.values() for key, t in module.tensors.items()}


def write_adapter(
    path: Path, file: AdapterFile, writer: str, dtype: torch.dtype | None = None, shown: AdapterFile | None = None
) -> None:
    """Write an adapter with the mark of its tool, and print how many modules of which rank it has (or `shown`)."""
    save_adapter_file(path, file, dtype, mark_of(writer, path))
    shown = file if shown is None else shown
    print_line(f"{path}: {len(shown.modules)} modules, rank {shown.metadata.get('ss_network_dim', 'none')}")


def write_lora(
    path: Path, modules: Iterable[ModuleWeights], metadata: Mapping[str, str], writer: str, dtype: torch.dtype | None,
    others: BaseNames, spec: BaseModelSpec | None = None,
) -> None:  # fmt: skip
    """Write a new LoRA under the names that training saves for its base model, which is recognised unless given.

    `others` are those of a pipeline without a table.
    """
    file = AdapterFile(str(path), {module.name: module for module in modules}, metadata, {})
    spec = spec or recognise_adapter(list_specs(), shapes_by_key(file), metadata)
    renamed = file if spec is None else to_saved_naming(file, others if spec.is_general else spec.names)
    write_adapter(path, renamed, writer, dtype, file)


def names_in(files: Iterable[AdapterFile]) -> BaseNames:
    """Return the modules that files name by the paths of a pipeline without a table, such as `transformer.blocks.0`."""
    paths = dict.fromkeys(name for file in files for name in file.modules if recognise_naming(name) == "diffusers")
    modules = tuple(name_by_path(*name.split(".", 1)) for name in paths)
    return BaseNames(general_spec().name, modules, saved_naming="diffusers")
