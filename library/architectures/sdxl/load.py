"""Checkpoints of Stable Diffusion XL to modules."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.sdxl.options import SdxlOptions
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights, configure, with_prefix
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.attention import wants_xformers, with_attention
from library.models.clip.clip import PROJECTION, clip_component, clip_of_folder, load_clip
from library.models.identify import (
    base_of_folder,
    refuse_other,
    refuse_other_file,
    refuse_other_folder,
    text_encoder_in,
    warn_of_other_prediction,
)
from library.models.loading import Component, MaybeComponent, first_side, materialise, open_if_there
from library.models.shapes import shape_of
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout
from library.models.unet.unet import (
    HEAD_WIDTH,
    check_unet_input,
    empty_unet,
    for_inpainting,
    size_embedding_config,
    unet_component,
)
from library.models.vae.vae import VaeNeeds, empty_vae, open_vae, vae_of_base
from library.options.model import BASE_FLAG

LATENT_CHANNELS = 4
LATENT_SCALE = 0.13025  # brings the latents of SDXL's VAE to about unit variance
POOLED_WIDTH = 1280  # of OpenCLIP's bigG, which the checkpoint does not tell without it
CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
CLIP_G_PREFIX = "conditioner.embedders.1.model."


@dataclass(frozen=True)
class SdxlLoader:
    """The four models of an SDXL checkpoint, each loaded when it is asked for; frozen, on the CPU."""

    path: Path  # the folder or file of the checkpoint
    unet: Component
    vae_component: MaybeComponent
    clip_l: MaybeComponent
    clip_g: MaybeComponent
    dtype: torch.dtype
    vae_dtype: torch.dtype
    uses_xformers: bool
    inpaints: bool

    @property
    def layout(self) -> UnetLayout:
        """What the block numbers of the single-file layout depend on; adapters are named after them."""
        return unet_layout_of(self.unet)

    @property
    def num_words(self) -> int | None:
        """Size of the vocabulary that both text encoders know; None where neither is there."""
        found = [first_side(clip, "embeddings.token_embedding.weight") for clip in (self.clip_l, self.clip_g)]
        return min((number for number in found if number is not None), default=None)

    def text_encoders(self) -> list[nn.Module]:
        """CLIP-L and OpenCLIP's bigG, the second with its projection."""
        return [load_clip(self.clip_l, self.dtype), load_clip(self.clip_g, self.dtype)]

    def vae(self) -> nn.Module:
        return with_attention(
            materialise(empty_vae(self.vae_component.config), self.vae_component.weights, self.vae_dtype),
            self.uses_xformers,
        )

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        unet = materialise(empty_unet(self.unet.config), self.unet.weights, self.dtype, weight_format)
        return with_attention(for_inpainting(unet, LATENT_CHANNELS) if self.inpaints else unet, self.uses_xformers)


def unet_layout_of(unet: Component) -> UnetLayout:
    """The layout of a U-Net by its configuration."""
    attends = tuple(kind.startswith("CrossAttn") for kind in unet.config["down_block_types"])
    return UnetLayout(int(unet.config.get("layers_per_block", 2)), attends)


def open_loader(options: SdxlOptions) -> SdxlLoader:
    """Open the checkpoint that the options name; of the files only headers are read.

    Raises UserError naming the flag when a file is missing, broken, incomplete or another kind of model.
    """
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise UserError(f"{BASE_FLAG} is missing: give a .safetensors or .ckpt file, a diffusers folder or a hub name")
    parts_of_folder = (("unet",), ("vae",), ("text_encoder",), ("text_encoder_2",))
    path = model_lookup.find_model(BASE_FLAG, name, parts_of_folder)
    if path.is_dir():
        warn_of_other_prediction(path, options.model.v_parameterization)
    whole = None if path.is_dir() else model_lookup.open_file(BASE_FLAG, path)
    parts = open_parts(BASE_FLAG, path, whole, options.text_caching.cache_text_encoder_outputs_to_disk)
    needs, vae = VaeNeeds("SDXL", LATENT_CHANNELS, LATENT_SCALE), options.model.vae
    check_unet_input(f"{BASE_FLAG} {path}", parts.unet, LATENT_CHANNELS, options.dataset.train_inpainting)
    dtype = DTYPES[options.precision.mixed_precision]
    return SdxlLoader(
        path=path,
        unet=parts.unet,
        vae_component=open_if_there(
            options.caching.cache_latents_to_disk,
            lambda: vae_of_base(BASE_FLAG, path, whole) if vae is None else open_vae(vae, needs),
        ),
        clip_l=parts.clip_l,
        clip_g=parts.clip_g,
        dtype=dtype,
        vae_dtype=torch.float32 if options.model.no_half_vae else dtype,
        uses_xformers=wants_xformers(options.memory),
        inpaints=options.dataset.train_inpainting,
    )


@dataclass(frozen=True)
class Parts:
    """The U-Net and both text encoders of a checkpoint."""

    unet: Component
    clip_l: MaybeComponent
    clip_g: MaybeComponent


def open_parts(flag: str, path: Path, whole: Weights | None, may_lack_text: bool = False) -> Parts:
    """Those of a folder, or of the single file `whole`; the text encoders may be absent where nothing needs them."""
    return folder_parts(flag, path, may_lack_text) if whole is None else single_file_parts(flag, whole, may_lack_text)


def folder_parts(flag: str, path: Path, may_lack_text: bool = False) -> Parts:
    """Those of a diffusers folder."""
    specs = list_specs()
    class_name = model_lookup.read_json(path / "model_index.json").get("_class_name", "")
    refuse_other_folder(specs, flag, path, "sdxl")
    unet = Component(*model_lookup.open_part(flag, path / "unet", "unet"))
    refuse_other(specs, flag, str(path), base_of_folder(specs, class_name, unet.weights.shapes), "sdxl")
    if not (path / "text_encoder").is_dir() and (path / "text_encoder_2").is_dir():
        raise UserError(f"{flag} {path}: this is the SDXL refiner; only the base model is trained")

    def clip(folder: str, projects: bool) -> Component:
        return clip_of_folder(*model_lookup.open_part(flag, path / folder, folder), projects=projects)

    clip_g = open_if_there(may_lack_text, lambda: clip("text_encoder_2", True))
    if isinstance(clip_g, Component):
        configure(clip_g.weights, lambda shapes: shape_of(shapes, PROJECTION))
    return Parts(unet, open_if_there(may_lack_text, lambda: clip("text_encoder", False)), clip_g)


def single_file_parts(flag: str, weights: Weights, may_lack_text: bool = False) -> Parts:
    """Those of a checkpoint in Stability's layout.

    Names outside of the parts (averages of training, schedule buffers) are left alone.
    """
    refuse_other_file(list_specs(), flag, weights, "sdxl")

    def clip(prefix: str, activation: str, projects: bool) -> Component:
        return clip_component(text_encoder_in(flag, weights, prefix), activation, projects=projects)

    clip_l = open_if_there(may_lack_text, lambda: clip(CLIP_L_PREFIX, "quick_gelu", False))
    clip_g = open_if_there(may_lack_text, lambda: clip(CLIP_G_PREFIX, "gelu", True))
    unet = unet_component(with_prefix(weights, UNET_PREFIX), HEAD_WIDTH)
    pooled_width = clip_g.config["projection_dim"] if isinstance(clip_g, Component) else POOLED_WIDTH
    sizes = configure(unet.weights, lambda shapes: size_embedding_config(shapes, pooled_width))
    return Parts(Component({**unet.config, **sizes}, unet.weights), clip_l, clip_g)
