"""A pipeline's folder as merging and extraction see it."""

from pathlib import Path

from torch import nn

from library.architectures.any_pipeline.folder import PipelineFolder, open_folder
from library.architectures.any_pipeline.targets import with_targets
from library.checkpoints.base_model import BaseModel, WeightFile
from library.errors import UserError
from networks.core.targets.targets import AdapterTargets


def open_for_merging(flag: str, path: Path) -> BaseModel:
    """Open the denoiser of a pipeline's folder; only the headers of its weights are read.

    Raises UserError naming `flag` unless exactly one model may be the denoiser.
    """
    folder = open_folder(str(path), trusts_code=False)
    name = find_denoiser(folder, flag)
    weights, (_, denoiser) = folder.open(name).weights, view_for_networks(path)
    targets = denoiser.adapter_targets
    assert isinstance(targets, AdapterTargets) and targets.names is not None
    stems = {module.kohya: str(module.diffusers).removeprefix(f"{name}.") for module in targets.names.modules}
    return BaseModel(path, (WeightFile(name, weights, stems),), targets.names, f"{folder.kind.__name__}/lora")


def view_for_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], denoiser) as network modules see it, on the meta device."""
    folder = open_folder(str(path), trusts_code=False)
    name = find_denoiser(folder, "the base model")
    return [], with_targets(folder.build_empty(name), name)


def find_denoiser(folder: PipelineFolder, flag: str) -> str:
    names, kind = folder.denoisers, folder.kind.__name__
    if not names:
        raise UserError(f"{flag} {folder.path}: model_index.json names no model of {kind} that draws; use another copy")
    if len(names) > 1:
        raise UserError(
            f"{flag} {folder.path}: {kind} has several models that an adapter may belong to ({', '.join(names)}); "
            "load the adapter with the pipeline and call its fuse_lora"
        )
    return names[0]
