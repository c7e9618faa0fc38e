"""Loading of Stable Diffusion XL checkpoints."""

from functools import partial

from library.architectures.sdxl.options import SdxlOptions
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure, with_prefix
from library.models.clip.clip import PROJECTION, clip_component, clip_of_folder
from library.models.identify import open_unet_folder, refuse_other_file, text_encoder_in
from library.models.loading import Component, open_if_there
from library.models.shapes import shape_of
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout
from library.models.unet.unet import HEAD_WIDTH, size_embedding_config, unet_component
from library.models.unet_loader import UnetLoader, UnetParts, open_unet_loader
from library.models.vae.vae import VaeNeeds

LATENT_CHANNELS = 4
LATENT_SCALE = 0.13025  # scales the latents of SDXL's VAE to about unit variance
POOLED_WIDTH = 1280  # of OpenCLIP's bigG, for when its files are missing
ENCODERS = ("text_encoder", "text_encoder_2")  # folders of CLIP-L and OpenCLIP's bigG
CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
CLIP_G_PREFIX = "conditioner.embedders.1.model."


def recognise_unet_layout(unet: Component) -> UnetLayout:
    """Return the layout that a U-Net's configuration describes."""
    attends = tuple(kind.startswith("CrossAttn") for kind in unet.config["down_block_types"])
    return UnetLayout(int(unet.config.get("layers_per_block", 2)), attends)


def open_loader(options: SdxlOptions) -> UnetLoader:
    """Open the checkpoint that the options name; only headers of its files are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or another kind of model.
    """
    parts_of = partial(open_parts, may_lack_text=options.text_caching.cache_text_encoder_outputs_to_disk)
    return open_unet_loader(options, VaeNeeds("SDXL", LATENT_CHANNELS, LATENT_SCALE), ENCODERS, parts_of)


def open_parts(files: BaseFiles, may_lack_text: bool = False) -> UnetParts:
    """Open the U-Net, CLIP-L and OpenCLIP's bigG; with `may_lack_text` the text encoders may be absent."""
    if files.whole is None:
        return folder_parts(files, may_lack_text)
    return single_file_parts(files.flag, files.whole, may_lack_text)


def folder_parts(files: BaseFiles, may_lack_text: bool = False) -> UnetParts:
    """Open the parts of a diffusers folder."""
    unet = Component(*open_unet_folder(list_specs(), files, "sdxl"))
    # The refiner has the second text encoder alone.
    if not (files.path / "text_encoder").is_dir() and (files.path / "text_encoder_2").is_dir():
        raise about(files.flag, files.path, cause="does not fit")(
            ": this is the SDXL refiner; only the base model can be trained"
        )

    def clip(folder: str, projects: bool) -> Component:
        return clip_of_folder(*files.open_folder(folder), projects=projects)

    clip_g = open_if_there(may_lack_text, lambda: clip("text_encoder_2", True))
    # The pooled features need the projection: without it the error should name the file, before anything is loaded.
    if isinstance(clip_g, Component):
        configure(clip_g.weights, lambda shapes: shape_of(shapes, PROJECTION))
    return UnetParts(unet, (open_if_there(may_lack_text, lambda: clip("text_encoder", False)), clip_g))


def single_file_parts(flag: str, weights: Weights, may_lack_text: bool = False) -> UnetParts:
    """Open the parts of a checkpoint in Stability's layout.

    Other tensors (averages of training, schedule buffers) are ignored.
    """
    refuse_other_file(list_specs(), flag, weights, "sdxl")

    def clip(prefix: str, activation: str, projects: bool) -> Component:
        return clip_component(text_encoder_in(flag, weights, prefix), activation, projects=projects)

    clip_l = open_if_there(may_lack_text, lambda: clip(CLIP_L_PREFIX, "quick_gelu", False))
    clip_g = open_if_there(may_lack_text, lambda: clip(CLIP_G_PREFIX, "gelu", True))
    unet = unet_component(with_prefix(weights, UNET_PREFIX), HEAD_WIDTH)
    # The layer that embeds pooled text and sizes shows only the sum of their widths.
    pooled_width = clip_g.config["projection_dim"] if isinstance(clip_g, Component) else POOLED_WIDTH
    sizes = configure(unet.weights, lambda shapes: size_embedding_config(shapes, pooled_width))
    return UnetParts(Component({**unet.config, **sizes}, unet.weights), (clip_l, clip_g))
