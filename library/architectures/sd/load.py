"""Checkpoints of Stable Diffusion 1.x and 2.x to modules."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights, with_prefix
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.attention import wants_xformers, with_attention
from library.models.clip.clip import clip_component, clip_of_folder, load_clip
from library.models.identify import (
    base_of_folder,
    refuse_other,
    refuse_other_file,
    refuse_other_folder,
    text_encoder_in,
    warn_of_other_prediction,
)
from library.models.loading import Component, MaybeComponent, materialise, open_if_there
from library.models.shapes import count, shape_of
from library.models.unet.checkpoint_keys import UNET_PREFIX
from library.models.unet.unet import HEAD_WIDTH, check_unet_input, empty_unet, for_inpainting, unet_component
from library.models.vae.vae import VaeNeeds, empty_vae, open_vae, vae_of_base
from library.options.model import BASE_FLAG
from library.options.train import TrainOptions

LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215  # brings the latents of Stable Diffusion's VAE to about unit variance
TITLES = {"sd1": "SD 1.x", "sd2": "SD 2.x"}  # in messages
CLIP_PREFIXES = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}
NUM_SD2_LAYERS = 23  # of the text encoder; the checkpoints have one more, whose output SD 2.x was not trained on


@dataclass(frozen=True)
class SdLoader:
    """The three models of an SD checkpoint, each loaded when it is asked for; frozen, on the CPU."""

    path: Path  # the folder or file of the checkpoint
    unet: Component
    vae_component: MaybeComponent
    clip: Component
    dtype: torch.dtype
    vae_dtype: torch.dtype
    uses_xformers: bool
    inpaints: bool

    @property
    def num_words(self) -> int:
        """Size of the text encoder's vocabulary."""
        return shape_of(self.clip.weights.shapes, "embeddings.token_embedding.weight")[0]

    @property
    def num_text_layers(self) -> int:
        return count(self.clip.weights.shapes, r"encoder\.layers\.(\d+)\.")

    def text_encoders(self) -> list[nn.Module]:
        return [load_clip(self.clip, self.dtype)]

    def vae(self) -> nn.Module:
        return with_attention(
            materialise(empty_vae(self.vae_component.config), self.vae_component.weights, self.vae_dtype),
            self.uses_xformers,
        )

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        unet = materialise(empty_unet(self.unet.config), self.unet.weights, self.dtype, weight_format)
        return with_attention(for_inpainting(unet, LATENT_CHANNELS) if self.inpaints else unet, self.uses_xformers)


def open_loader(options: TrainOptions) -> SdLoader:
    """Open the checkpoint that the options name; of the files only headers are read.

    Raises UserError naming the flag when a file is missing, broken, incomplete or another kind of model.
    """
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise UserError(f"{BASE_FLAG} is missing: give a .safetensors or .ckpt file, a diffusers folder or a hub name")
    base = "sd2" if options.model.v2 else "sd1"
    path = model_lookup.find_model(BASE_FLAG, name, (("unet",), ("vae",), ("text_encoder",)))
    if path.is_dir():
        warn_of_other_prediction(path, options.model.v_parameterization)
    whole = None if path.is_dir() else model_lookup.open_file(BASE_FLAG, path)
    parts = open_parts(BASE_FLAG, path, base, whole)
    needs = VaeNeeds(TITLES[base], LATENT_CHANNELS, LATENT_SCALE)
    vae = options.model.vae
    check_unet_input(f"{BASE_FLAG} {path}", parts["unet"], LATENT_CHANNELS, options.dataset.train_inpainting)
    dtype = DTYPES[options.precision.mixed_precision]
    return SdLoader(
        path=path,
        unet=parts["unet"],
        vae_component=open_if_there(
            options.caching.cache_latents_to_disk,
            lambda: vae_of_base(BASE_FLAG, path, whole) if vae is None else open_vae(vae, needs),
        ),
        clip=parts["text_encoder"],
        dtype=dtype,
        vae_dtype=torch.float32 if options.model.no_half_vae else dtype,
        uses_xformers=wants_xformers(options.memory),
        inpaints=options.dataset.train_inpainting,
    )


def open_parts(flag: str, path: Path, base: str, whole: Weights | None) -> dict[str, Component]:
    """unet and text_encoder of a folder, or of the single file `whole`, of the model `base` ("sd1", "sd2")."""
    return folder_parts(flag, path, base) if whole is None else single_file_parts(flag, whole, base)


def folder_parts(flag: str, path: Path, base: str) -> dict[str, Component]:
    """The U-Net and the text encoder of a diffusers folder."""
    specs = list_specs()
    class_name = model_lookup.read_json(path / "model_index.json").get("_class_name", "")
    refuse_other_folder(specs, flag, path, base)
    parts = {"unet": Component(*model_lookup.open_part(flag, path / "unet", "unet"))}
    refuse_other(specs, flag, str(path), base_of_folder(specs, class_name, parts["unet"].weights.shapes), base)
    parts["text_encoder"] = clip_of_folder(*model_lookup.open_part(flag, path / "text_encoder", "text_encoder"))
    return parts


def single_file_parts(flag: str, weights: Weights, base: str) -> dict[str, Component]:
    """The U-Net and the text encoder of a checkpoint in Stability's layout.

    Names outside of the parts (averages of training, schedule buffers) are left alone.
    """
    refuse_other_file(list_specs(), flag, weights, base)
    clip = text_encoder_in(flag, weights, CLIP_PREFIXES[base])
    return {
        "unet": unet_component(with_prefix(weights, UNET_PREFIX), HEAD_WIDTH if base == "sd2" else None),
        "text_encoder": clip_component(clip, "gelu", num_layers=NUM_SD2_LAYERS)
        if base == "sd2"
        else clip_component(clip, "quick_gelu"),
    }
