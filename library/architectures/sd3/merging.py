"""Stable Diffusion 3 checkpoints for merging and extracting adapters: the file with the denoiser."""

from library.architectures.sd3.layers import KEYS, NAMES, denoiser_module, view
from library.architectures.sd3.load import read_denoiser
from library.architectures.sd3.model import MMDiT, read_config, recognise_version
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.weights import Weights, configure
from library.models.transformer_file import TransformerFile


def architecture_of(weights: Weights) -> str:
    return f"stable-diffusion-3-{recognise_version(configure(read_denoiser(weights), read_config))}"


def name_text_layer(stem: str) -> ModuleNames | None:
    """Return the names of a layer of a text encoder in the file; None for other layers."""
    return NAMES.find(stem) if stem.startswith("text_encoders.") else None


FILE = TransformerFile(
    base="sd3",
    title="SD3",
    architecture=architecture_of,
    mark="joint_blocks.0.x_block.attn.qkv.weight",
    diffusers_mark=None,
    is_layer=KEYS.is_linear,
    name=denoiser_module,
    build=MMDiT,
    read_config=read_config,
    view=view,
    name_text_layer=name_text_layer,
)
