"""The parts of tiny models: their weights, and the files that they are written to."""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tests.tiny.init import fixed_init

BASE = "--pretrained_model_name_or_path"
Parts = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]  # (config.json, weights) by diffusers' folder names
ConfigT = TypeVar("ConfigT")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def tiny_denoiser(model: Callable[[ConfigT], ModuleT], config: ConfigT, seed: int) -> ModuleT:
    """Return a frozen denoiser with random weights."""
    with torch.device("meta"):
        denoiser = model(config)
    denoiser.load_state_dict(fixed_init(denoiser, seed), assign=True)
    return denoiser.requires_grad_(False).eval()


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def write_files(folder: Path, files: Mapping[str, tuple[str, dict[str, Tensor]]]) -> list[str]:
    """Write one file per flag, from its stem and weights; return the options that name the files."""
    from safetensors.torch import save_file

    arguments = []
    for flag, (stem, state) in files.items():
        save_file(state, folder / f"{stem}.safetensors")
        arguments += [flag, str(folder / f"{stem}.safetensors")]
    return arguments


def write_whole(
    folder: Path,
    flag: str,
    stem: str,
    denoiser: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    text: dict[str, Tensor],
) -> list[str]:
    """Write a model into one file in ComfyUI's layout; `text` has the text encoders under their names in that file."""
    state = {**prefixed("model.diffusion_model.", denoiser), **prefixed("vae.", vae), **text}
    return write_files(folder, {flag: (stem, state)})


def write_folder(
    folder: Path,
    index: Mapping[str, Any],
    parts: Parts,
    diffusers_state: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    flag: str = BASE,
) -> list[str]:
    """Write a folder in diffusers' layout with this model_index.json; `diffusers_state` renames the denoiser's
    weights."""
    import diffusers
    from safetensors.torch import save_file

    pipeline = getattr(diffusers, index["_class_name"], object)
    if denoiser := inspect.signature(pipeline).parameters.get("transformer"):
        name = getattr(denoiser.annotation, "__name__", denoiser.annotation)  # some classes have text as annotations
        index = {**index, "transformer": ["diffusers", name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, (config, state) in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        weights = diffusers_state(state) if name == "transformer" else state
        save_file(weights, folder / name / f"{stem}.safetensors", {"format": "pt"})
    return [flag, str(folder)]
