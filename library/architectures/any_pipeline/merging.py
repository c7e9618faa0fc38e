"""A pipeline's folder as merging and extraction see it. Folders that cannot be trained are merged into, too."""

from pathlib import Path

from torch import nn

from library.architectures.any_pipeline.folder import PipelineFolder, find_class, read_folder
from library.architectures.any_pipeline.targets import with_targets
from library.checkpoints.base_model import BaseModel, WeightFile
from library.checkpoints.model_lookup import read_json
from library.errors import UserError
from networks.core.targets.targets import AdapterTargets


def open_for_merging(flag: str, path: Path) -> BaseModel:
    """Open the denoiser of a pipeline's folder; only the headers of its weights are read.

    Raises UserError naming `flag` unless exactly one model may be the denoiser.
    """
    folder, name = find_denoiser(flag, path)
    targets = denoiser_view(folder, name).adapter_targets
    assert isinstance(targets, AdapterTargets) and targets.names is not None
    stems = {module.kohya: str(module.diffusers).removeprefix(f"{name}.") for module in targets.names.modules}
    file = WeightFile(name, folder.open(name).weights, stems)
    return BaseModel(path, (file,), targets.names, f"{folder.kind.__name__}/lora")


def view_for_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], denoiser) as network modules see it, on the meta device."""
    return [], denoiser_view(*find_denoiser("the base model", path))


def denoiser_view(folder: PipelineFolder, name: str) -> nn.Module:
    return with_targets(folder.build_empty(name), name)


def find_denoiser(flag: str, path: Path) -> tuple[PipelineFolder, str]:
    """Return the folder and the name of the model that draws. Raises UserError unless there is exactly one."""
    index = read_json(path / "model_index.json")
    kind = find_class("pipeline", index["_class_name"], path, trusts_code=False, flag=flag)
    folder = read_folder(flag, path, kind, index)
    names = folder.denoisers
    if not names:
        raise UserError(
            f"{flag} {path}: model_index.json names no model of {kind.__name__} that draws; use another copy"
        )
    if len(names) > 1:
        raise UserError(
            f"{flag} {path}: {kind.__name__} has several models that an adapter may belong to ({', '.join(names)}); "
            "load the adapter with the pipeline and call its fuse_lora"
        )
    return folder, names[0]
