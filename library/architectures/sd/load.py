"""Loading of Stable Diffusion 1.x and 2.x checkpoints."""

from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, with_prefix
from library.models.clip.clip import clip_component, clip_of_folder
from library.models.identify import open_unet_folder, refuse_other_file, text_encoder_in
from library.models.loading import Component
from library.models.unet.checkpoint_keys import UNET_PREFIX
from library.models.unet.unet import HEAD_WIDTH, unet_component
from library.models.unet_loader import UnetLoader, UnetParts, open_unet_loader
from library.models.vae.vae import VaeNeeds
from library.options.train import TrainOptions

LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215  # scales the VAE's latents to about unit variance
TITLES = {"sd1": "SD 1.x", "sd2": "SD 2.x"}  # in messages
CLIP_PREFIXES = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}
NUM_SD2_LAYERS = 23  # of the text encoder; checkpoints have one more, which SD 2.x does not use


def open_loader(options: TrainOptions) -> UnetLoader:
    """Open the checkpoint that the options name; only headers of its files are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or another kind of model.
    """
    base = "sd2" if options.model.v2 else "sd1"

    def open_unet(files: BaseFiles) -> UnetParts:
        parts = open_parts(files, base)
        return UnetParts(parts["unet"], (parts["text_encoder"],))

    return open_unet_loader(
        options, VaeNeeds(TITLES[base], LATENT_CHANNELS, LATENT_SCALE), ("text_encoder",), open_unet
    )


def open_parts(files: BaseFiles, base: str) -> dict[str, Component]:
    """Open unet and text_encoder of the model `base` ("sd1", "sd2")."""
    return folder_parts(files, base) if files.whole is None else single_file_parts(files.flag, files.whole, base)


def folder_parts(files: BaseFiles, base: str) -> dict[str, Component]:
    """Open the U-Net and the text encoder of a diffusers folder."""
    unet = Component(*open_unet_folder(list_specs(), files, base))
    return {"unet": unet, "text_encoder": clip_of_folder(*files.open_folder("text_encoder"))}


def single_file_parts(flag: str, weights: Weights, base: str) -> dict[str, Component]:
    """Open the U-Net and the text encoder of a checkpoint in Stability's layout.

    Other tensors (averages of training, schedule buffers) are ignored.
    """
    refuse_other_file(list_specs(), flag, weights, base)
    clip = text_encoder_in(flag, weights, CLIP_PREFIXES[base])
    # Shapes show neither the heads nor the activation. SD 1.x has a fixed number of heads and OpenAI's text encoder,
    # SD 2.x a fixed width of a head and OpenCLIP's.
    return {
        "unet": unet_component(with_prefix(weights, UNET_PREFIX), HEAD_WIDTH if base == "sd2" else None),
        "text_encoder": clip_component(clip, "gelu", num_layers=NUM_SD2_LAYERS)
        if base == "sd2"
        else clip_component(clip, "quick_gelu"),
    }
