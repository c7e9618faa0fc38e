"""The parts of Stable Diffusion 1.x and 2.x in single files and diffusers folders."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from library.architectures.sd.load import CLIP_PREFIXES, NUM_SD2_LAYERS
from library.checkpoints.weights import Weights, rename_weights, select_weights
from library.models.clip.clip import to_open_clip
from library.models.loading import Component
from library.models.shapes import count
from library.models.unet.checkpoint_keys import UNET_PREFIX, unet_to_ldm
from library.models.unet.unet import layout_of_config
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_to_ldm

PARTS = ("unet", "vae", "text_encoder")
VAE_SIDE = 256  # image size in the VAE's training; diffusers' tiles have this size
LAST_LAYER, ONE_MORE = (f"transformer.resblocks.{n}." for n in (NUM_SD2_LAYERS - 1, NUM_SD2_LAYERS))


def to_single_file(base: str, parts: Mapping[str, Component], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of unet, vae and text_encoder in `dtype`, under the names of Stability's checkpoints of `base`.

    Attention projections have the shape of these checkpoints: 1x1 convolutions, but matrices in the U-Net of SD 2.x.
    """
    unet, vae = parts["unet"], parts["vae"].weights
    layout = layout_of_config(unet.config)
    num_levels = count(vae.shapes, r"encoder\.down_blocks\.(\d+)\.")
    text = drop_position_ids(parts["text_encoder"].weights)
    text = to_open_clip(text) if base == "sd2" else rename_weights(text, lambda key: f"text_model.{key}")
    for weights, prefix, name_of in (
        (unet.weights, UNET_PREFIX, lambda key: unet_to_ldm(key, layout)),
        (text, CLIP_PREFIXES[base], lambda key: key),
        (vae, VAE_PREFIX, lambda key: vae_to_ldm(key, num_levels)),
    ):
        for key in weights.shapes:
            value = weights.read(key)
            if is_projection(key):
                value = as_convolution(value) if weights is vae or base == "sd1" else as_matrix(value)
            yield prefix + name_of(key), value.to(dtype)


def is_projection(key: str) -> bool:
    """Return True if a weight, by diffusers' name, projects into or out of attention over pixels."""
    ends = ("proj_in.weight", "proj_out.weight", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    return ".attentions." in key and ".transformer_blocks." not in key and key.endswith(ends)


def as_convolution(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def as_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def build_unused_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of an SD 2.x file that are unused, but that programs need to recognise and load it: the
    last layer (here a copy of the one before), the text projection and the temperature."""
    prefix = CLIP_PREFIXES["sd2"]
    last_layer = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix + LAST_LAYER)}
    # safetensors refuses tensors that share memory.
    copies = {key.replace(LAST_LAYER, ONE_MORE): tensor.clone() for key, tensor in last_layer.items()}
    embedding = tensors[f"{prefix}token_embedding.weight"]
    # Nothing reads these two. Ones are what sd-scripts' converter writes, so the files of both are equal.
    projection = torch.ones(embedding.shape[1], embedding.shape[1], dtype=embedding.dtype)
    return {**copies, f"{prefix}text_projection": projection, f"{prefix}logit_scale": torch.tensor(1, dtype=dtype)}


def other_weights(file_weights: Weights, converted: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the remaining weights of a single file as stored: averages of training, schedule buffers, position IDs."""
    prefix = CLIP_PREFIXES["sd1"]
    for key in file_weights.shapes:
        # The oldest checkpoints have the text encoder's names without "text_model.", which other programs expect.
        is_old = key.startswith(tuple(f"{prefix}{part}." for part in ("embeddings", "encoder", "final_layer_norm")))
        name = f"{prefix}text_model.{key.removeprefix(prefix)}" if is_old else key
        if name not in converted:
            yield name, file_weights.read(key)


def to_folder(part: str, component: Component, dtype: torch.dtype, is_linear: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of one part in `dtype`, under the names that diffusers and transformers save.

    `is_linear` makes the U-Net's projections matrices instead of 1x1 convolutions.
    """
    weights = component.weights
    if part == "text_encoder":
        weights = rename_weights(drop_position_ids(weights), lambda key: f"text_model.{key}")
    for key in weights.shapes:
        value = weights.read(key)
        # diffusers' VAE has matrices; its U-Net has either, as use_linear_projection says.
        if part != "text_encoder" and is_projection(key):
            value = as_matrix(value) if part == "vae" or is_linear else as_convolution(value)
        yield key, value.to(dtype)


def folder_config(
    part: str, config: Mapping[str, Any], reference: Mapping[str, Any], is_linear: bool
) -> dict[str, Any]:
    """Return config.json of a part, inferred from its weights; what a U-Net's weights do not tell comes from
    `reference`, another model's configuration."""
    if part == "unet":
        unet_config = {**reference, **config, "use_linear_projection": is_linear}
        return {"_class_name": "UNet2DConditionModel", **unet_config}
    if part == "vae":
        return {"sample_size": VAE_SIDE, **config, "_class_name": "AutoencoderKL"}
    return {**config, "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}


def drop_position_ids(text: Weights) -> Weights:
    """Drop a text encoder's position IDs, which old files contain and models create themselves."""
    return select_weights(text, {key: key for key in text.shapes if not key.endswith("position_ids")})
