"""The files of Qwen-Image 2.1: three files, one file with everything, or a diffusers folder."""

from dataclasses import replace
from functools import partial

from library.architectures.qwen_image_21.layers import FUSED, PARTS, denoiser_module, is_linear
from library.architectures.qwen_image_21.model import QwenImage21, read_config
from library.architectures.qwen_image_21.text import MARKS
from library.architectures.qwen_image_21.vae import CHANNELS, load_qwen_image_21_vae, open_vae
from library.architectures.specs import list_specs
from library.checkpoints.fused_tensors import split_rows
from library.models.language_model_dit import DitFiles, open_models
from library.models.qwen3_vl import qwen3_vl_encoder
from library.models.qwen3_vl_vision import load_vision, vision_component
from library.models.transformer_file import TransformerFile
from library.models.vae.vae import TransformerVae

FILES = DitFiles(
    TransformerFile(
        base="qwen_image_21",
        title="Qwen-Image 2.1",
        architecture="Qwen-Image-2.1",
        mark="txt_in.text_norm.weight",
        diffusers_mark=None,
        is_layer=is_linear,
        name=denoiser_module,
        build=QwenImage21,
        read_config=read_config,
        split_fused=partial(split_rows, fused=FUSED, parts=PARTS),
    ),
    encoder=replace(
        qwen3_vl_encoder("8B"),
        marks=MARKS,
        tokenizer_folders=("processor", "tokenizer"),
        vision=(vision_component, load_vision),
    ),
    vae=TransformerVae(open_vae, load_qwen_image_21_vae, CHANNELS, "token"),
    list_specs=list_specs,
    fp8="fp8_vl",
)
open_loader = partial(open_models, FILES)
