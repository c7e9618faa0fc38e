"""Full-size checkpoints known only by tensor names and shapes, and the models built from them."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.sd import load as sd
from library.architectures.sd.layers import view as sd_view
from library.architectures.sdxl import load as sdxl
from library.architectures.sdxl.layers import build_view
from library.checkpoints.weights import Weights
from library.models.clip.clip import PROJECTION, empty_clip
from library.models.loading import Component
from library.models.unet.checkpoint_keys import UnetLayout
from library.models.unet.unet import empty_unet
from library.models.vae.vae import vae_of_checkpoint

DATA = Path(__file__).parent / "data"
SDXL_LAYOUT = UnetLayout(layers_per_block=2, has_attention=(False, True, True))


def facts(name: str) -> dict[str, Any]:
    inventory: dict[str, Any] = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    return inventory


def checkpoint(model: str) -> Weights:
    """Return the checkpoint with its tensors on the meta device."""
    return weights_of_shapes({name: tuple(shape) for name, shape in facts(model)["checkpoint"].items()}, model)


def parts(model: str) -> dict[str, Component]:
    """Return the parts of the "sd21" or "sdxl" checkpoint under their diffusers and transformers paths."""
    weights = checkpoint(model)
    vae = {"vae": vae_of_checkpoint("--flag", weights)}
    if model == "sdxl":
        components = sdxl.single_file_parts("--flag", weights)
        clip_l, clip_g = components.clips
        assert isinstance(clip_l, Component) and isinstance(clip_g, Component)
        return {"unet": components.unet, "text_encoder": clip_l, "text_encoder_2": clip_g, **vae}
    return {**sd.single_file_parts("--flag", weights, "sd2"), **vae}


def empty_encoders(components: dict[str, Component]) -> list[nn.Module]:
    """Build the text encoders without weights."""
    clips = [component for part, component in components.items() if part.startswith("text_encoder")]
    return [empty_clip(clip.config, projects=PROJECTION in clip.weights.shapes) for clip in clips]


def view_for_networks(model: str) -> tuple[Any, nn.Module]:
    """Return text encoder(s) and U-Net as network modules see them, without weights."""
    components = parts(model)
    view = build_view(SDXL_LAYOUT) if model == "sdxl" else sd_view
    with torch.device("meta"):
        return view(empty_encoders(components), empty_unet(components["unet"].config))


def weights_of_shapes(shapes: Mapping[str, tuple[int, ...]], origin: str = "file") -> Weights:
    """Return a checkpoint of these shapes with its tensors on the meta device."""
    return Weights(origin, shapes, lambda name: torch.empty(shapes[name], device="meta"))


def shapes_of_model(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
