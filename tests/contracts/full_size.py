"""Full-size checkpoints of which only names and shapes are known, and the models that are made of them."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.sd import load as sd
from library.architectures.sd.targets import view as sd_view
from library.architectures.sdxl import load as sdxl
from library.architectures.sdxl.targets import build_view
from library.checkpoints.weights import Weights
from library.models.clip.clip import PROJECTION, empty_clip
from library.models.loading import Component
from library.models.unet.checkpoint_keys import UnetLayout
from library.models.unet.unet import empty_unet
from library.models.vae.vae import vae_of_checkpoint

DATA = Path(__file__).parent / "data"
SDXL_LAYOUT = UnetLayout(layers_per_block=2, has_attention=(False, True, True))


def facts(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    return found


def checkpoint(model: str) -> Weights:
    """The checkpoint as if it had been opened."""
    return opened({name: tuple(shape) for name, shape in facts(model)["checkpoint"].items()}, model)


def parts(model: str) -> dict[str, Component]:
    """The parts of the checkpoint of "sd21" or "sdxl" under the paths of diffusers and transformers."""
    whole = checkpoint(model)
    vae = {"vae": vae_of_checkpoint("--flag", whole)}
    if model == "sdxl":
        found = sdxl.single_file_parts("--flag", whole)
        clip_l, clip_g = found.clips
        assert isinstance(clip_l, Component) and isinstance(clip_g, Component)
        return {"unet": found.unet, "text_encoder": clip_l, "text_encoder_2": clip_g, **vae}
    return {**sd.single_file_parts("--flag", whole, "sd2"), **vae}


def empty_encoders(found: dict[str, Component]) -> list[nn.Module]:
    """The text encoders without weights."""
    clips = [component for part, component in found.items() if part.startswith("text_encoder")]
    return [empty_clip(clip.config, projects=PROJECTION in clip.weights.shapes) for clip in clips]


def view_for_networks(model: str) -> tuple[Any, nn.Module]:
    """Text encoder(s) and U-Net as network modules see them, without weights."""
    found = parts(model)
    view = build_view(SDXL_LAYOUT) if model == "sdxl" else sd_view
    with torch.device("meta"):
        return view(empty_encoders(found), empty_unet(found["unet"].config))


def opened(shapes: Mapping[str, tuple[int, ...]], origin: str = "file") -> Weights:
    """A checkpoint as if it had been opened; its values are on the meta device."""
    return Weights(origin, shapes, lambda name: torch.empty(shapes[name], device="meta"))


def shapes_of_model(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
