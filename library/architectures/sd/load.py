"""Checkpoints of Stable Diffusion 1.x to modules.

A module is built without memory (on the meta device) and takes its weights straight in the training dtype, so nothing
is initialised twice and the peak is about the weights themselves.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from library.architectures.sd import recognise, shapes, sources
from library.architectures.sd.keys import (
    CLIP_PREFIX,
    UNET_PREFIX,
    VAE_ATTENTION_2022,
    VAE_PREFIX,
    swap_stem,
    unet_from_ldm,
    vae_from_ldm,
)
from library.checkpoints.weights import Weights
from library.options.train import TrainOptions

logger = logging.getLogger(__name__)

BASE_FLAG = "--pretrained_model_name_or_path"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LATENT_CHANNELS = 4
NUM_NAMES_SHOWN = 5

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Component:
    """One model that is not loaded yet: its configuration, and weights under its module paths."""

    config: Mapping[str, Any]
    weights: Weights


@dataclass(frozen=True)
class SdLoader:
    """The three models of an SD 1.x checkpoint, each loaded when it is asked for; frozen, on the CPU."""

    path: Path  # the folder or file of the checkpoint
    unet: Component
    vae_component: Component
    clip: Component
    dtype: torch.dtype
    vae_dtype: torch.dtype
    uses_xformers: bool

    @property
    def num_words(self) -> int:
        """Size of the text encoder's vocabulary."""
        return shapes.shape_of(self.clip.weights.shapes, "embeddings.token_embedding.weight")[0]

    @property
    def num_text_layers(self) -> int:
        return shapes.count(self.clip.weights.shapes, r"encoder\.layers\.(\d+)\.")

    def text_encoders(self) -> list[nn.Module]:
        encoder: nn.Module = empty_clip(self.clip.config)
        materialise(clip_body(encoder), self.clip.weights, self.dtype)
        return [encoder.requires_grad_(False).eval()]

    def vae(self) -> nn.Module:
        return with_attention(
            materialise(empty_vae(self.vae_component.config), self.vae_component.weights, self.vae_dtype),
            self.uses_xformers,
        )

    def denoiser(self) -> nn.Module:
        return with_attention(
            materialise(empty_unet(self.unet.config), self.unet.weights, self.dtype), self.uses_xformers
        )


def open_loader(options: TrainOptions) -> SdLoader:
    """Open the checkpoint that the options name; of the files only headers are read.

    Raises ValueError naming the flag when a file is missing, broken, incomplete or another kind of model.
    """
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise ValueError(f"{BASE_FLAG} is missing: give a .safetensors or .ckpt file, a diffusers folder or a hub name")
    if options.model.v2:
        raise ValueError("--v2 is not supported yet: only SD 1.x checkpoints are")
    path = sources.find_model(BASE_FLAG, name, (("unet",), ("vae",), ("text_encoder",)))
    if path.is_dir():
        warn_of_other_prediction(path, options.model.v_parameterization)
    own_vae = options.model.vae is None
    parts = (
        folder_parts(path, own_vae) if path.is_dir() else single_file_parts(sources.open_file(BASE_FLAG, path), own_vae)
    )
    if options.model.vae is not None:
        parts["vae"] = open_vae(options.model.vae)
    check_parts(path, parts)
    dtype = DTYPES[options.precision.mixed_precision]
    return SdLoader(
        path=path,
        unet=parts["unet"],
        vae_component=parts["vae"],
        clip=parts["text_encoder"],
        dtype=dtype,
        vae_dtype=torch.float32 if options.model.no_half_vae else dtype,
        uses_xformers=wants_xformers(options),
    )


def warn_of_other_prediction(path: Path, predicts_velocity: bool) -> None:
    """Say so when a diffusers folder was trained to predict another thing than this run will teach it."""
    learned = sources.read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if predicts_velocity != (learned == "v_prediction"):
        verb = "give" if learned == "v_prediction" else "leave out"
        logger.warning(
            "%s says that the model predicts %s; %s --v_parameterization to go on with that", path, learned, verb
        )


def wants_xformers(options: TrainOptions) -> bool:
    """Whether attention runs in xformers; torch's scaled dot product attention is used otherwise."""
    from importlib.util import find_spec

    memory = options.memory
    if memory.mem_eff_attn:
        logger.info("--mem_eff_attn: torch's scaled dot product attention (sdpa) is used, which needs as little memory")
        return False
    if memory.xformers and find_spec("xformers") is None:
        raise ValueError(
            "--xformers needs the package xformers, which is not installed: run `pip install xformers`, or give --sdpa "
            "instead, which uses the attention built into torch"
        )
    return memory.xformers


def with_attention(model: Any, uses_xformers: bool) -> nn.Module:
    """The diffusers model with its attention set; torch's scaled dot product attention is what it comes with."""
    if uses_xformers:
        model.enable_xformers_memory_efficient_attention()
    module: nn.Module = model
    return module


def folder_parts(path: Path, own_vae: bool) -> dict[str, Component]:
    """The parts of a diffusers folder, the VAE only when `own_vae`."""
    class_name = sources.read_json(path / "model_index.json").get("_class_name", "")
    recognise.refuse_other_pipeline(BASE_FLAG, str(path), class_name)
    if (path / "text_encoder_2").is_dir():
        raise ValueError(f"{BASE_FLAG} {path}: this is an SDXL model; use sdxl_train_network.py")
    parts = {"unet": Component(*sources.open_part(BASE_FLAG, path / "unet", "unet"))}
    recognise.refuse_sd2(BASE_FLAG, str(path), parts["unet"].weights.shapes)
    config, weights = sources.open_part(BASE_FLAG, path / "text_encoder", "text_encoder")
    parts["text_encoder"] = Component(config, renamed(weights, clip_from_any))
    if own_vae:
        config, weights = sources.open_part(BASE_FLAG, path / "vae", "vae")
        parts["vae"] = Component(config, renamed(weights, vae_from_old_diffusers))
    return parts


def single_file_parts(weights: Weights, own_vae: bool) -> dict[str, Component]:
    """The parts of a checkpoint in Stability's layout, the VAE only when `own_vae`.

    Names outside the three parts (averages of training, schedule buffers) are left alone.
    """
    recognise.refuse_other_model(BASE_FLAG, weights)
    unet = with_prefix(weights, UNET_PREFIX)
    layout = configure(unet, shapes.unet_layout)
    unet = renamed(unet, lambda key: unet_from_ldm(key, layout))
    clip = renamed(with_prefix(weights, CLIP_PREFIX), clip_from_any)
    parts = {
        "unet": Component(configure(unet, shapes.unet_config), unet),
        "text_encoder": Component(configure(clip, shapes.clip_config), clip),
    }
    if own_vae:
        vae = with_prefix(weights, VAE_PREFIX)
        if not vae.shapes:
            raise ValueError(
                f"{BASE_FLAG} {weights.origin} has no VAE (nothing begins with {VAE_PREFIX!r}); give one with --vae"
            )
        parts["vae"] = single_vae(vae)
    return parts


def open_vae(name: str) -> Component:
    """The VAE of --vae: a file in either layout, a diffusers folder or one that has vae/, or a hub name."""
    path = sources.find_model("--vae", name, (("", "vae"),))
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        config, weights = sources.open_part("--vae", folder, "vae")
        refuse_no_vae(name, weights)
        component = Component(config, renamed(weights, vae_from_old_diffusers))
        scale = config.get("scaling_factor", 0.18215)
        if scale != 0.18215:
            logger.warning("--vae %s is made for latents scaled by %s, SD 1.x scales by 0.18215", name, scale)
    else:
        weights = sources.open_file("--vae", path)
        if any(key.startswith(VAE_PREFIX) for key in weights.shapes):
            weights = with_prefix(weights, VAE_PREFIX)
        refuse_no_vae(name, weights)
        component = single_vae(weights)
    channels = component.weights.shapes["decoder.conv_in.weight"][1]
    if channels != LATENT_CHANNELS:
        raise ValueError(
            f"--vae {name} has {channels} latent channels, SD 1.x needs {LATENT_CHANNELS}; use an SD 1.x VAE"
        )
    return component


def refuse_no_vae(name: str, weights: Weights) -> None:
    """Raise ValueError when --vae names something else."""
    if "decoder.conv_in.weight" not in weights.shapes:
        first = ", ".join(list(weights.shapes)[:3]) or "none"
        raise ValueError(
            f"--vae {name} is no VAE of this kind: it has no decoder.conv_in.weight (first names: {first})"
        )


def single_vae(weights: Weights) -> Component:
    """A VAE from one file without prefix, in Stability's or diffusers' layout. Leftovers of training are dropped."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    weights = selected(weights, {key: key for key in weights.shapes if key.startswith(parts)})
    if any(key.startswith("encoder.down_blocks.") for key in weights.shapes):
        weights = renamed(weights, vae_from_old_diffusers)
    else:
        num_levels = shapes.count(weights.shapes, r"decoder\.up\.(\d+)\.")
        weights = renamed(weights, lambda key: vae_from_ldm(key, num_levels))
    return Component(configure(weights, shapes.vae_config), weights)


def check_parts(path: Path, parts: Mapping[str, Component]) -> None:
    """Raise ValueError where the parts do not fit what SD 1.x training feeds them."""
    channels = parts["unet"].config.get("in_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise ValueError(
            f"{BASE_FLAG} {path}: the U-Net takes {channels} input channels, training feeds {LATENT_CHANNELS}; "
            "inpainting and other conditioned variants of SD 1.x are not supported"
        )


def configure(weights: Weights, read_config: Callable[[shapes.Shapes], ConfigT]) -> ConfigT:
    """What `read_config` reads off the shapes; its errors name the file."""
    try:
        return read_config(weights.shapes)
    except ValueError as error:
        raise ValueError(f"{weights.origin}: {error}") from None


def selected(weights: Weights, old_names: Mapping[str, str]) -> Weights:
    """The tensors `old_names` lists, under their new names."""
    return replace(
        weights,
        shapes={new: weights.shapes[old] for new, old in old_names.items()},
        read=lambda name: weights.read(old_names[name]),
    )


def renamed(weights: Weights, rename: Callable[[str], str]) -> Weights:
    return selected(weights, {rename(key): key for key in weights.shapes})


def with_prefix(weights: Weights, prefix: str) -> Weights:
    """Only the tensors whose names begin with `prefix`, without it."""
    return selected(weights, {key[len(prefix) :]: key for key in weights.shapes if key.startswith(prefix)})


def clip_from_any(key: str) -> str:
    """transformers 5 has no "text_model." in the paths of CLIPTextModel, files have it or not."""
    return key.removeprefix("text_model.")


def vae_from_old_diffusers(key: str) -> str:
    """Attention weights of VAEs saved by diffusers before 0.12 under their present names."""
    match = re.fullmatch(r"(.+\.mid_block\.attentions\.\d+)\.(.+)", key)
    return f"{match[1]}.{swap_stem(match[2], VAE_ATTENTION_2022) or match[2]}" if match else key


def empty_unet(config: Mapping[str, Any]) -> Any:
    """diffusers' UNet2DConditionModel on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def empty_vae(config: Mapping[str, Any]) -> Any:
    """diffusers' AutoencoderKL on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def empty_clip(config: Mapping[str, Any]) -> Any:
    """transformers' CLIPTextModel on the meta device, but for its position ids, which no file has."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
    position_ids = torch.arange(clip.config.max_position_embeddings).expand((1, -1))
    clip_body(clip).embeddings.register_buffer("position_ids", position_ids, persistent=False)
    return clip


def clip_body(encoder: nn.Module) -> Any:
    """The module that has `embeddings`, `encoder` and `final_layer_norm`: in transformers 5 the model itself."""
    return getattr(encoder, "text_model", encoder)


def materialise(model: nn.Module, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device its weights in `dtype`; frozen, in evaluation mode.

    Raises ValueError naming missing weights and wrong shapes; names that the model does not know are warned of.
    """
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights.shapes]
    if missing:
        raise ValueError(
            f"{weights.origin} is incomplete: {len(missing)} of the {len(wanted)} weights of "
            f"{type(model).__name__} are missing: {first_names(missing)}"
        )
    unknown = [name for name in weights.shapes if name not in wanted and not name.endswith("position_ids")]
    if unknown:
        logger.warning(
            "%s has %d weights that %s does not know, they are not used: %s",
            weights.origin, len(unknown), type(model).__name__, first_names(unknown),
        )  # fmt: skip
    wrong = [name for name, tensor in wanted.items() if not same_matrix(weights.shapes[name], tuple(tensor.shape))]
    if wrong:
        has, needs = weights.shapes[wrong[0]], tuple(wanted[wrong[0]].shape)
        raise ValueError(
            f"{weights.origin}: {len(wrong)} weights do not fit {type(model).__name__}, the first is {wrong[0]}: "
            f"it has the shape {has}, the model needs {needs}"
        )
    values = {name: weights.read(name).reshape(tensor.shape).to(dtype) for name, tensor in wanted.items()}
    model.load_state_dict(values, assign=True)
    return model.requires_grad_(False).eval()


def same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Equal shapes, a 1x1 convolution counting as the matrix it is."""
    return a == b or (prod(a) == prod(b) and a[:2] == b[:2] and len(a) != len(b) and set(a[2:] + b[2:]) == {1})


def first_names(names: list[str]) -> str:
    more = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
